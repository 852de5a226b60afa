"""Whether a tuning run may go on from its checkpoint. What this leaves out: finding that (`run_start`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from minicpm import config as configuration
from minicpm.errors import CheckpointError
from minicpm.train.run_start import FREE_FIELDS, Start
from minicpm.train.tune_config import TuneConfig


def check_same_run(config: TuneConfig, start: Start, tokenizer_hash: str) -> TuneConfig:
    """Return `config` with what the checkpoint's program decided, if the checkpoint was made with it.

    Raises:
        CheckpointError: a field that changes what is computed differs, or the run is complete.
    """
    assert start.manifest is not None
    before = configuration.build(TuneConfig, dict(start.manifest.run["config"]))
    if start.manifest.tokenizer_sha256 != tokenizer_hash:
        raise CheckpointError(f"{start.folder} was made with another tokenizer than {config.base} has")
    batch = config.batch
    if not batch.micro_sequences:
        batch = dataclasses.replace(batch, micro_sequences=before.batch.micro_sequences)
    loop = config.loop
    for name in ("compile", "products"):
        if getattr(loop, name) == "auto":
            loop = dataclasses.replace(loop, **{name: getattr(before.loop, name)})
    config = dataclasses.replace(config, batch=batch, loop=loop)
    for section in dataclasses.fields(TuneConfig):
        if section.name == "name":
            continue
        old, new = (_plain(section.name, getattr(c, section.name)) for c in (before, config))
        for field, value in old.items():
            if value != new[field] and field not in FREE_FIELDS.get(section.name, ()):
                name = f"{section.name}.{field}" if field else section.name
                raise CheckpointError(
                    f"{start.folder} was made with {name} = {value!r}, and now it is {new[field]!r}; set it back, or "
                    "begin another run with --out"
                )
    if start.step >= config.schedule.total_steps:
        raise CheckpointError(f"{start.folder} is the end of its run; tune it further as the base of another one")
    return config


def _plain(name: str, value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value):
        return {"": value}
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
