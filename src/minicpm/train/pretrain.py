"""Pretraining: a configuration and a folder → a run; everything that can be wrong is found before the model is built.

What this leaves out: the command line, and choosing where a run begins (`run_start`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minicpm.data.batches import Batch
from minicpm.data.opening import check_identity
from minicpm.errors import CheckpointError
from minicpm.formats.atomic_file import atomic_file
from minicpm.model.minicpm import MiniCPM
from minicpm.train import checkpoint, fused
from minicpm.train.arithmetic import Arithmetic, choose_arithmetic, choose_device
from minicpm.train.corpus import Corpus, StepBatches, open_corpus
from minicpm.train.failure import write_failure
from minicpm.train.heldout import HeldoutText
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
from minicpm.train.losses import linear_cross_entropy, sum_by_source
from minicpm.train.plan import Plan, available_bytes, make_plan
from minicpm.train.plot import plot_loss
from minicpm.train.pretrain_config import PretrainConfig
from minicpm.train.recording import Recorder
from minicpm.train.run_start import Start, adopt, recorded_config
from minicpm.train.samples import sample_hook
from minicpm.train.saving import Saver
from minicpm.train.settings import Ranks
from minicpm.train.state import TrainState, new_state
from minicpm.train.work import LossParts, Work


@dataclasses.dataclass(frozen=True)
class Ready:
    """A run whose inputs were checked, before its model is built."""

    config: PretrainConfig
    run: Path
    start: Start
    corpus: Corpus
    plan: Plan
    arithmetic: Arithmetic
    device: torch.device


def prepare(
    config: PretrainConfig,
    run: Path,
    start: Start,
    say: Callable[[str], None],
    memory_bytes: int = 0,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Ready:
    """Return the run with its data opened, its plan made and its disk checked.

    Raises:
        MiniCPMError: whatever cannot be used, in one line.
    """
    if start.manifest is not None:
        config = adopt(config, recorded_config(start.manifest))
    device = choose_device(config.loop.device)
    arithmetic = choose_arithmetic(config.loop, config.schedule.total_steps, device, say)
    plan = make_plan(
        config.model, config.schedule, config.batch, config.optimizer, config.loop,
        is_compiled=arithmetic.is_compiled, is_widened=arithmetic.is_widened,
        memory_bytes=memory_bytes or available_bytes(), peak_flops=arithmetic.peak_flops,
    )  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    corpus = open_corpus(config, run, say, on_progress)
    if start.manifest is not None:
        if start.manifest.tokenizer_sha256 != corpus.tokenizer_hash:
            raise CheckpointError(f"{start.folder} was made with another tokenizer than {run / 'tokenizer'}")
        check_identity(corpus.shards, start.manifest.run.get("data", {}))
        threads = start.manifest.run.get("threads")
        if threads != torch.get_num_threads():
            say(f"made with {threads} threads, now {torch.get_num_threads()}: sums are rounded in another order")
    try:
        checkpoint.check_space(run, plan.checkpoint_bytes)
    except OSError as error:
        raise CheckpointError(f"{error.strerror}; make room on the disk of {run} or use --out elsewhere") from error
    # What the program decided is written down, so that going on decides the same.
    batch = dataclasses.replace(config.batch, micro_sequences=plan.micro_sequences)
    config = dataclasses.replace(config, batch=batch, loop=arithmetic.decide(config.loop))
    return Ready(config, run, start, corpus, plan, arithmetic, device)


def pretraining_loss(
    device: torch.device, is_compiled: bool, is_widened: bool = False
) -> Callable[[MiniCPM, Batch, float], LossParts]:
    """Return the loss of a batch: next-token cross-entropy within documents, with each source's part."""

    def loss(model: MiniCPM, batch: Batch, factor: float) -> LossParts:
        ids, targets, documents, positions, sources = (
            torch.from_numpy(array).to(device)
            for array in (batch.input_ids, batch.targets, batch.document_ids, batch.positions, batch.source_ids)
        )
        # Measuring has other shapes and no backward pass: it would compile code of its own for a few rows.
        compiles = is_compiled and torch.is_grad_enabled()
        hidden = fused.hidden_states(
            model,
            ids,
            positions=positions,
            document_ids=documents,
            is_compiled=compiles,
            is_widened=is_widened,
        )  # (B, T, E)
        total, losses = linear_cross_entropy(
            hidden, model.head_weight, targets,
            divisor=model.config.logit_divisor, factor=factor, is_compiled=compiles, is_widened=is_widened,
        )  # fmt: skip
        sums, counts = sum_by_source(losses, targets, sources[:, None].expand_as(targets), len(batch.sources))
        parts = zip(batch.sources, sums.tolist(), counts.tolist(), strict=True)
        return LossParts(total, {f"loss/{name}": (value, count) for name, value, count in parts if count})

    return loss


def identify(batch: Batch) -> dict[str, Any]:
    """Return where a batch's text comes from."""
    return {"first_row": batch.first_row, "documents": [reference._asdict() for reference in batch.references]}


def pretrain(ready: Ready, say: Callable[[str], None], hooks: Sequence[Hook] = ()) -> tuple[LoopEnd, int]:
    """Train until the schedule ends or somebody stops it; return where, and the exit code (0, 130 or 143).

    Raises:
        TrainingStopped: a loss that is not finite; the dump lies in the run's folder.
        CheckpointError: the last checkpoint could not be written.
    """
    config, run, ranks = ready.config, ready.run, Ranks()
    state = make_state(ready)
    progress = ProgressLine(
        config.schedule, flops_per_token=ready.plan.flops_per_token, peak_flops=ready.arithmetic.peak_flops
    )
    checkpoint.clear_partial(run)
    write_run_file(ready)
    saver = make_saver(ready, progress, ranks)
    recorder = make_recorder(ready, saver, state, progress)
    batches = StepBatches(ready.corpus.stream, config, config.batch.micro_sequences, ranks)
    loss = pretraining_loss(ready.device, ready.arithmetic.is_compiled, ready.arithmetic.is_widened)
    work = Work(batches, lambda batch: float(batch.num_targets), loss, lambda batch: batch.input_ids.size, identify)

    def on_failure(state: TrainState, facts: dict[str, Any]) -> str:
        good = saver.last_good.name if saver.last_good else "none"
        return f"What was in it: {write_failure(run, facts)}; the last good checkpoint: {good}"

    try:
        with Interruption() as interruption:
            end = train(
                state, work, config.schedule,
                save=saver,
                is_save_due=lambda step: config.loop.is_saved(step, config.schedule.total_steps),
                hooks=[*_own_hooks(ready, progress, saver, loss), *([recorder] if recorder else []), *hooks],
                is_stop_asked=lambda: interruption.is_asked,
                on_failure=on_failure,
                ranks=ranks,
            )  # fmt: skip
    finally:
        progress.close()
        batches.close()
        if recorder is not None:
            recorder.close()
        with unwritten_is_said("the picture of the loss", progress.note):
            plot_loss(run, config.schedule)
    saver.check_last(end.step)
    return end, interruption.exit_code


def make_state(ready: Ready) -> TrainState:
    """Return the model and optimizer at the run's start."""
    config = ready.config
    state = new_state(config.model, config.optimizer, config.loop.seed, config.loop.dtype, ready.device)
    if ready.start.folder is not None:
        if ready.start.has_state:
            state.load(*checkpoint.read_tensors(ready.start.folder))
        else:
            state.load_weights(checkpoint.read_weights(ready.start.folder))
        state.step = ready.start.step
    state.model.checkpoint_every = config.loop.recompute_every
    return state


def make_saver(ready: Ready, progress: ProgressLine, ranks: Ranks) -> Saver:
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


def make_recorder(ready: Ready, saver: Saver, state: TrainState, progress: ProgressLine) -> Recorder | None:
    """Return what writes this run's history; None where none is wanted, or in all processes but the first.

    Raises:
        CheckpointError: the folder cannot be this run's history.
    """
    name = ready.config.checkpoint.history
    if name == "off" or not saver.ranks.is_first:
        return None
    return Recorder(Path(name) if name else ready.run / "history", ready.config, saver, state, progress.note)


def run_facts(ready: Ready) -> dict[str, Any]:
    """Return what a checkpoint says about its run, as plain data."""
    return {
        "config": json.loads(json.dumps(dataclasses.asdict(ready.config))),
        "data": ready.corpus.identity,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def write_run_file(ready: Ready) -> None:
    """Write `run.json`: the resolved configuration, for people and for tools that read a run without a checkpoint."""
    with atomic_file(ready.run / "run.json") as file:
        file.write(json.dumps(run_facts(ready), indent=2).encode() + b"\n")


def _own_hooks(ready: Ready, progress: ProgressLine, saver: Saver, loss: Any) -> list[Hook]:
    config, run = ready.config, ready.run
    loop = config.loop
    metrics = MetricsFile(run, ready.start.step, progress.note)
    events = open_tensorboard(run) if loop.uses_tensorboard else None
    heldout: HeldoutText | None = None
    if loop.eval_every and ready.corpus.heldout:
        heldout = HeldoutText(ready.corpus.heldout, config.batch.sequence_length, loop.eval_sequences, loop.seed)

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
        if heldout is None or not is_due:
            return
        found = heldout.measure(state.model, loss, config.batch.micro_sequences)
        saver.measured = {**found, "heldout_step": record.step}
        write({"step": record.step, **found})
        progress.note(
            f"step {record.step}: held-out loss {found['heldout_loss']:.4f} nats a token, "
            f"{found['heldout_bits_per_byte']:.4f} bits a byte"
        )

    return [record_step, measure, sample_hook(ready.corpus.tokenizer, loop, run, progress.note)]
