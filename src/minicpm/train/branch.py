"""A decay as a branch: the configuration of a run that had been meant to decay at that step all along.

What this leaves out: finding the checkpoint (`run_start`) and training (`pretrain`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from minicpm.data.mixture import Mix, MixKind, StageMixture, stage_mixture
from minicpm.errors import ConfigError
from minicpm.train.pretrain_config import PretrainConfig
from minicpm.train.run_start import Start, recorded_config


def branch_config(
    start: Start, parent: Path, steps: int, kind: str, shares: Sequence[tuple[str, float, MixKind]]
) -> PretrainConfig:
    """Return the configuration of a decay of `steps` from `start`, a checkpoint of the run in folder `parent`.

    Args:
        start: where it begins.
        parent: whose tokenizer and token shards it goes on using.
        steps: its length.
        kind: the shape of the decay; empty is the run's.
        shares: (path, share of tokens, "text" or "rows") of what is mixed in; the run's own sources keep the rest.

    Raises:
        ConfigError: shares of 1 and more together, or the checkpoint lies in a decay already.
    """
    assert start.manifest is not None
    if start.manifest.stage in ("decay", "tail"):
        raise ConfigError(
            f"step {start.step} of {parent} is in its {start.manifest.stage} stage; branch from a stable checkpoint"
        )
    config = recorded_config(start.manifest).branch(start.step, steps, kind)
    config = dataclasses.replace(
        config,
        tokenizer=dataclasses.replace(config.tokenizer, path=str((parent / "tokenizer").resolve())),
        corpus=dataclasses.replace(config.corpus, cache=config.corpus.cache or str((parent / "data").resolve())),
    )
    if config.checkpoint.history != "off":
        # Its own, never its parent's.
        config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, history=""))
    return dataclasses.replace(config, data="", stage=mixed_stages(config, shares)) if shares else config


def mixed_stages(config: PretrainConfig, shares: Sequence[tuple[str, float, MixKind]]) -> tuple[StageMixture, ...]:
    """Return the stages with `shares` in the decay, the others of the decay scaled down to what is left."""
    added = sum(share for _, share, _ in shares)
    if added >= 1:
        raise ConfigError(f"the shares mixed in sum to {added:.6g}; they must leave something to the run's own text")
    decay = stage_mixture(config.stages, "decay")
    kept = [dataclasses.replace(m, weight=decay.shares[m.name] * (1 - added)) for m in decay.mix]
    taken = {mix.name for stage in config.stages for mix in stage.mix}
    mixes = list(kept)
    for path, share, kind in shares:
        name = Path(path).name.split(".")[0] or "mixed"
        while name in taken:
            name += "+"
        taken.add(name)
        mixes.append(Mix(name, share, path, kind=kind))
    others = tuple(stage for stage in config.stages if stage.name != "decay")
    return (*others, StageMixture(mix=tuple(mixes), name="decay", normalise=True))
