"""Pretraining: a configuration and a folder → a run; everything that can be wrong is found before the model is built.

What this leaves out: the command line, and choosing where a run begins (`run_start`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minicpm.data.batches import Batch
from minicpm.data.opening import check_identity
from minicpm.data.shards import TokenShards
from minicpm.errors import CheckpointError
from minicpm.formats.checkpoint import Checkpoint
from minicpm.model.loading import load_model
from minicpm.model.minicpm import MiniCPM
from minicpm.train import checkpoint, fused
from minicpm.train.arithmetic import choose_arithmetic, choose_device
from minicpm.train.corpus import Corpus, StepBatches, open_corpus
from minicpm.train.heldout import HeldoutText, LossFunction
from minicpm.train.lineage import parent_of
from minicpm.train.loop import Hook, LoopEnd
from minicpm.train.losses import linear_cross_entropy, sum_by_source
from minicpm.train.plan import available_bytes, make_plan
from minicpm.train.pretrain_config import PretrainConfig
from minicpm.train.run_start import Start, adopt, recorded_config
from minicpm.train.running import Measurement, Ready, check_disk, run_work
from minicpm.train.settings import Ranks, RunConfig
from minicpm.train.state import TrainState, new_state, wrap_state
from minicpm.train.work import LossParts, Work

PretrainReady = Ready[PretrainConfig, Corpus]


def prepare(
    config: PretrainConfig,
    run: Path,
    start: Start,
    say: Callable[[str], None],
    memory_bytes: int = 0,
    on_progress: Callable[[int, int, int], None] | None = None,
    base: Checkpoint | None = None,
) -> PretrainReady:
    """Return the run with its data opened, its plan made and its disk checked.

    `base` is the model that it begins from, whose network `config` has (`continuation`); None begins from nothing.

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
    check_disk(run, plan)
    # What the program decided is written down, so that going on decides the same.
    batch = dataclasses.replace(config.batch, micro_sequences=plan.micro_sequences)
    config = dataclasses.replace(config, batch=batch, loop=arithmetic.decide(config.loop))
    parent, folder = parent_of(base.path) if base is not None else (start.parent, "")
    start = start if start.manifest is not None else dataclasses.replace(start, parent=parent)
    return Ready(config, run, start, corpus, plan, arithmetic, device, folder, base)


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


def pretrain(ready: PretrainReady, say: Callable[[str], None], hooks: Sequence[Hook] = ()) -> tuple[LoopEnd, int]:
    """Train until the schedule ends or somebody stops it; return where, and the exit code (0, 130 or 143).

    Raises:
        TrainingStopped: a loss that is not finite; the dump lies in the run's folder.
        CheckpointError: the last checkpoint could not be written.
    """
    config = ready.config
    state = make_state(ready)
    batches = StepBatches(
        ready.corpus.stream.batch, config.batch, config.schedule.total_steps, Ranks(), config.corpus.workers
    )
    loss = pretraining_loss(ready.device, ready.arithmetic.is_compiled, ready.arithmetic.is_widened)
    work = Work(batches, lambda batch: float(batch.num_targets), loss, lambda batch: batch.input_ids.size, identify)
    measurement = heldout_measurement(ready.corpus.heldout, config, loss) if config.loop.eval_every else None
    if measurement is not None and ready.base is not None and state.step == 0:
        say(f"before training: {measurement.describe(measurement.measure(state))}")
    return run_work(ready, state, work, say, measurement=measurement, hooks=hooks, close=batches.close)


def make_state(ready: PretrainReady) -> TrainState:
    """Return the model and optimizer at the run's start."""
    config = ready.config
    if ready.base is not None:
        model = load_model(config.model, ready.base.weights, dtype=torch.float32, device=ready.device)
        state = wrap_state(model, config.optimizer, config.loop.dtype, config.loop.seed)
    else:
        state = new_state(config.model, config.optimizer, config.loop.seed, config.loop.dtype, ready.device)
    if ready.start.folder is not None:
        if ready.start.has_state:
            state.load(*checkpoint.read_tensors(ready.start.folder))
        else:
            state.load_weights(checkpoint.read_weights(ready.start.folder))
        state.step = ready.start.step
    state.model.checkpoint_every = config.loop.recompute_every
    return state


def heldout_measurement(parts: Mapping[str, TokenShards], config: RunConfig, loss: LossFunction) -> Measurement | None:
    """Return the loss on held-out shards as what a run measures, or None where there are none."""
    if not parts:
        return None
    text = HeldoutText(parts, config.batch.sequence_length, config.loop.eval_sequences, config.loop.seed)
    return Measurement(
        lambda state: text.measure(state.model, loss, config.batch.micro_sequences),
        lambda found: (
            f"held-out loss {found['heldout_loss']:.4f} nats a token, {found['heldout_bits_per_byte']:.4f} bits a byte"
        ),
    )
