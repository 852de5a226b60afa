"""How a run begins: from nothing, from its own newest whole checkpoint, or from a step of another run.

What this leaves out: making the model (`state`), and the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm import config as configuration
from minicpm.errors import CheckpointError
from minicpm.history.naming import StepName, open_history, step_folder
from minicpm.train import checkpoint
from minicpm.train import schedule as schedules
from minicpm.train.checkpoint import Manifest
from minicpm.train.pretrain_config import PretrainConfig

# What may differ when a run goes on: how often it is saved, logged and measured, and where text is kept.
FREE_FIELDS = {
    "loop": {"device", "log_every", "save_every", "saves_early", "eval_every", "eval_sequences", "sample_every",
             "sample_prompts", "sample_tokens", "uses_tensorboard"},
    "corpus": {"workers", "cache"},
    "checkpoint": {"history", "every", "base_error", "max_reads"},
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run goes on from, if any, and what its own checkpoints name as parent.

    `has_state` tells a checkpoint with masters and moments from one of a history, which is weights alone.
    """

    folder: Path | None = None
    manifest: Manifest | None = None
    parent: str | None = None
    has_state: bool = True

    @property
    def step(self) -> int:
        """The last step already made."""
        return self.manifest.step if self.manifest else 0


def recorded_config(manifest: Manifest) -> PretrainConfig:
    """Return the configuration that a checkpoint was made with."""
    return configuration.build(PretrainConfig, dict(manifest.run["config"]))


def find_start(run: Path, config: PretrainConfig, wants_resume: bool, say: Callable[[str], None]) -> Start:
    """Return where the run in folder `run` begins.

    Raises:
        CheckpointError: there are checkpoints and nobody asked to go on, there are none to go on from, the run is
            finished, or the configuration does not continue theirs.
    """
    own = find_own(run, wants_resume, say)
    if own.folder is None or own.manifest is None:
        return own
    before = recorded_config(own.manifest)
    check_continues(before, adopt(config, before), own.folder, own.step)
    total = config.schedule.total_steps
    if own.step >= total:
        raise CheckpointError(
            f"{run} is complete: step {own.step} of {total}; raise schedule.total_steps, or branch with "
            f"`minicpm decay {run}@STEP --steps N`"
        )
    return own


def find_own(run: Path, wants_resume: bool, say: Callable[[str], None]) -> Start:
    """Return the newest whole checkpoint of `run` as its start, or a start from nothing.

    Raises:
        CheckpointError: there are checkpoints and nobody asked to go on, or none of them is whole.
    """
    newest = checkpoint.step_folders(run)[-1:] if run.is_dir() else []
    if newest and not wants_resume:
        raise CheckpointError(
            f"{run} holds checkpoints up to {newest[0].name}; go on with --resume, or name another folder with --out"
        )
    if not wants_resume:
        return Start()
    folder, manifest, skipped = checkpoint.newest_verified(run)
    for reason in skipped:
        say(f"skipped {reason}")
    if folder is None or manifest is None:
        if skipped:
            raise CheckpointError(f"{run} has no whole checkpoint to resume ({len(skipped)} are broken, see above)")
        say(f"{run} has no checkpoint yet; the run begins")
        return Start()
    # The parent of a branch stays the same for all of its checkpoints.
    return Start(folder, manifest, manifest.parent)


def branch_from(run: Path, step: int) -> Start:
    """Return the start of a branch from the checkpoint of `step`, verified: saved whole, or else from the history.

    Raises:
        CheckpointError: there is none (with the nearest), or it is broken.
    """
    if not (run / checkpoint.step_name(step)).is_dir() and (run / "history").is_dir():
        return _branch_from_history(run, step)
    folder, manifest = checkpoint.find(run, step)
    digest = checkpoint.sha256(folder / checkpoint.MANIFEST)
    return Start(folder, manifest, f"{run.name}@{step} {digest}")


def _branch_from_history(run: Path, step: int) -> Start:
    history = open_history(str(run))
    row = history.row(step)
    facts, about = history.manifest(row).facts, history.about
    if "config" not in about.run:
        raise CheckpointError(f"{history.place.name} was imported: it does not say how its run was made")
    manifest = Manifest(
        step=step, stage=facts.stage, tokens=facts.tokens, lr=facts.lr, losses=dict(facts.losses), seed=facts.seed,
        tokenizer_sha256=about.tokenizer_sha256, run=dict(about.run), parent=facts.parent,
    )  # fmt: skip
    folder = step_folder(StepName(str(run), step, "exact"))
    return Start(folder, manifest, f"{run.name}@{step} {row.manifest_sha256}", has_state=False)


def adopt(config: PretrainConfig, before: PretrainConfig) -> PretrainConfig:
    """Return `config` with what it leaves to the program decided as it was before, so that the bits are the same."""
    loop, batch = config.loop, config.batch
    if loop.compile == "auto":
        loop = dataclasses.replace(loop, compile=before.loop.compile)
    if loop.products == "auto":
        loop = dataclasses.replace(loop, products=before.loop.products)
    if not batch.micro_sequences:
        batch = dataclasses.replace(batch, micro_sequences=before.batch.micro_sequences)
    return dataclasses.replace(config, loop=loop, batch=batch)


def check_continues(before: PretrainConfig, now: PretrainConfig, folder: Path, step: int) -> None:
    """Return if the checkpoint in `folder`, made with `before` up to `step`, can go on with `now`.

    Raises:
        CheckpointError: naming the field that differs, or the step whose rate or stage would have been another.
    """
    for section in dataclasses.fields(PretrainConfig):
        if section.name in ("schedule", "name", "stage", "data"):
            continue
        old, new = (_plain(getattr(c, section.name)) for c in (before, now))
        for field in old:
            if old[field] != new[field] and field not in FREE_FIELDS.get(section.name, ()):
                raise CheckpointError(
                    f"{folder} was made with {section.name}.{field} = {old[field]!r}, and now it is {new[field]!r}; "
                    "set it back, or begin another run with --out"
                )
    for past in range(1, step + 1):
        was, would = ((schedules.lr(c.schedule, past), schedules.stage(c.schedule, past)) for c in (before, now))
        if was != would:
            raise CheckpointError(
                f"{folder}: step {past} was made in stage {was[1]} with lr {was[0]:.6g}, the schedule now says "
                f"{would[1]} with {would[0]:.6g}; a run can be lengthened only before its decay; see "
                "`minicpm decay RUN@STEP`"
            )
    firsts = [[span for span in c.spans() if span.first_row <= c.batch.sequences_before(step)] for c in (before, now)]
    if firsts[0] != firsts[1]:
        raise CheckpointError(
            f"{folder}: the mixture of the steps up to {step} is another one now; begin another run with --out"
        )


def _plain(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
