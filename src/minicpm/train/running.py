"""What every kind of training has around its loop: lines, metrics, checkpoints, history, failures, interruption.

What this leaves out: the inputs (`pretrain` and `tune` prepare theirs), and the loop itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from minicpm.errors import CheckpointError
from minicpm.formats.atomic_file import atomic_file
from minicpm.formats.checkpoint import Checkpoint
from minicpm.tokenizer import Tokenizer
from minicpm.train import checkpoint
from minicpm.train.arithmetic import Arithmetic
from minicpm.train.failure import write_failure
from minicpm.train.interruption import Interruption
from minicpm.train.log import (
    MetricsFile,
    ProgressLine,
    open_tensorboard,
    record_row,
    resident_bytes,
    unwritten_is_said,
)
from minicpm.train.loop import Hook, LoopEnd, StepRecord, train
from minicpm.train.plan import Plan
from minicpm.train.plot import plot_loss
from minicpm.train.recording import Recorder
from minicpm.train.run_start import Start
from minicpm.train.samples import sample_hook
from minicpm.train.saving import Saver
from minicpm.train.settings import Ranks, RunConfig
from minicpm.train.state import TrainState
from minicpm.train.work import Work


class RunCorpus(Protocol):
    """What a run reads, as far as its checkpoints and samples need to know it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's."""

    @property
    def tokenizer_hash(self) -> str:
        """Its fingerprint."""

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """What each checkpoint carries, so that it opens as a model."""

    @property
    def identity(self) -> dict[str, str]:
        """Content hash of every source."""


C = TypeVar("C", bound=RunConfig)
K = TypeVar("K", bound=RunCorpus)


@dataclasses.dataclass(frozen=True)
class Ready(Generic[C, K]):
    """A run whose inputs were checked, before its model is built.

    `base` is the model that it begins from, None for a run from nothing; `parent` is that model's folder.
    """

    config: C
    run: Path
    start: Start
    corpus: K
    plan: Plan
    arithmetic: Arithmetic
    device: torch.device
    parent: str = ""
    base: Checkpoint | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured on held-out data: the numbers, and the line that a person reads of them."""

    measure: Callable[[TrainState], dict[str, float]]
    describe: Callable[[dict[str, float]], str]


def run_work(
    ready: Ready[Any, Any],
    state: TrainState,
    work: Work[Any],
    say: Callable[[str], None],
    *,
    measurement: Measurement | None = None,
    hooks: Sequence[Hook] = (),
    close: Callable[[], None] = lambda: None,
) -> tuple[LoopEnd, int]:
    """Train until the schedule ends or somebody stops it; return where, and the exit code (0, 130 or 143).

    Args:
        ready: the run.
        state: at its start.
        work: batches and loss.
        say: writes a line for the person.
        measurement: of held-out data, each `loop.eval_every` steps.
        hooks: called after every step, last.
        close: called at the end in any case.

    Raises:
        TrainingStopped: a loss that is not finite; the dump lies in the run's folder.
        CheckpointError: the last checkpoint could not be written.
    """
    config, run, ranks = ready.config, ready.run, Ranks()
    progress = ProgressLine(
        config.schedule, flops_per_token=ready.plan.flops_per_token, peak_flops=ready.arithmetic.peak_flops
    )
    checkpoint.clear_partial(run)
    write_run_file(ready)
    saver = make_saver(ready, progress, ranks)
    recorder = make_recorder(ready, saver, state, progress, work.stage)
    own = _own_hooks(ready, progress, saver, measurement)

    def on_failure(state: TrainState, facts: dict[str, Any]) -> str:
        good = saver.last_good.name if saver.last_good else "none"
        return f"What was in it: {write_failure(run, facts)}; the last good checkpoint: {good}"

    try:
        with Interruption() as interruption:
            end = train(
                state, work, config.schedule,
                save=saver,
                is_save_due=lambda step: config.loop.is_saved(step, config.schedule.total_steps),
                hooks=[*own, *([recorder] if recorder else []), *hooks],
                is_stop_asked=lambda: interruption.is_asked,
                on_failure=on_failure,
                ranks=ranks,
            )  # fmt: skip
    finally:
        progress.close()
        close()
        if recorder is not None:
            recorder.close()
        with unwritten_is_said("the picture of the loss", progress.note):
            plot_loss(run, config.schedule)
    saver.check_last(end.step)
    return end, interruption.exit_code


def make_saver(ready: Ready[Any, Any], progress: ProgressLine, ranks: Ranks) -> Saver:
    """Return what writes this run's checkpoints."""
    config = ready.config
    facts = {
        "seed": config.loop.seed,
        "tokenizer_sha256": ready.corpus.tokenizer_hash,
        "run": run_facts(ready),
        "parent": ready.start.parent,
    }
    last_good = ready.start.folder if ready.start.folder and ready.start.folder.parent == ready.run else None
    return Saver(
        ready.run, facts, ready.corpus.tokenizer_files, config.batch.tokens_through,
        progress.note, progress.mark_saved, ranks, last_good,
    )  # fmt: skip


def make_recorder(
    ready: Ready[Any, Any], saver: Saver, state: TrainState, progress: ProgressLine, stage: str
) -> Recorder | None:
    """Return what writes this run's history; None where none is wanted, or in all processes but the first.

    Raises:
        CheckpointError: the folder cannot be this run's history.
    """
    name = ready.config.checkpoint.history
    # An adapter is no model, and small: each of its checkpoints is kept whole.
    if name == "off" or state.adapter is not None or not saver.ranks.is_first:
        return None
    folder = Path(name) if name else ready.run / "history"
    return Recorder(folder, ready.config, saver, state, progress.note, stage)


def run_facts(ready: Ready[Any, Any]) -> dict[str, Any]:
    """Return what a checkpoint says about its run, as plain data."""
    return {
        "config": json.loads(json.dumps(dataclasses.asdict(ready.config))),
        "data": ready.corpus.identity,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        **({"parent_folder": ready.parent} if ready.parent else {}),
    }


def write_run_file(ready: Ready[Any, Any]) -> None:
    """Write `run.json`: the resolved configuration, for people and for tools that read a run without a checkpoint."""
    with atomic_file(ready.run / "run.json") as file:
        file.write(json.dumps(run_facts(ready), indent=2).encode() + b"\n")


def check_disk(run: Path, plan: Plan) -> None:
    """Return if the disk has room for a checkpoint.

    Raises:
        CheckpointError: with the numbers.
    """
    try:
        checkpoint.check_space(run, plan.checkpoint_bytes)
    except OSError as error:
        raise CheckpointError(f"{error.strerror}; make room on the disk of {run} or use --out elsewhere") from error


def _own_hooks(
    ready: Ready[Any, Any], progress: ProgressLine, saver: Saver, measurement: Measurement | None
) -> list[Hook]:
    config, run = ready.config, ready.run
    loop = config.loop
    metrics = MetricsFile(run, ready.start.step, progress.note)
    events = open_tensorboard(run) if loop.uses_tensorboard else None

    def write(row: dict[str, Any]) -> None:
        metrics.add(row)
        if events is not None:
            with unwritten_is_said("an event for TensorBoard", progress.note):
                events(row)

    def record_step(state: TrainState, record: StepRecord) -> None:
        progress.show(state, record)
        if record.step % loop.log_every == 0 or record.step == config.schedule.total_steps:
            write(record_row(record, resident_bytes(state.device)))

    def measure(state: TrainState, record: StepRecord) -> None:
        is_due = loop.eval_every and (record.step % loop.eval_every == 0 or record.step == config.schedule.total_steps)
        if measurement is None or not is_due:
            return
        found = measurement.measure(state)
        saver.measured = {**found, "heldout_step": record.step}
        write({"step": record.step, **found})
        progress.note(f"step {record.step}: {measurement.describe(found)}")

    return [record_step, measure, sample_hook(ready.corpus.tokenizer, loop, run, progress.note)]
