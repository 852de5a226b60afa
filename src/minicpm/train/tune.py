"""Tuning a model on rows: supervised, on preferences, or on judged answers; all of its weights, or adapters.

What this leaves out: the command line, the loop, and what the runs of pretraining do in the same way (`running`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minicpm.data.opening import check_identity
from minicpm.errors import CheckpointError, ConfigError
from minicpm.formats.checkpoint import Checkpoint
from minicpm.model.loading import load_model
from minicpm.model.quantized import load_quantized
from minicpm.train import checkpoint
from minicpm.train.answer_loss import AnswerWork
from minicpm.train.arithmetic import choose_arithmetic, choose_device
from minicpm.train.corpus import StepBatches
from minicpm.train.lineage import parent_of
from minicpm.train.loop import Hook, LoopEnd
from minicpm.train.plan import available_bytes
from minicpm.train.pretrain import heldout_measurement, identify, pretraining_loss
from minicpm.train.run_start import Start
from minicpm.train.running import Ready, check_disk, run_work
from minicpm.train.settings import Ranks
from minicpm.train.state import DTYPES, TrainState, adapter_state, wrap_state
from minicpm.train.tune_config import TuneConfig
from minicpm.train.tune_corpus import TuneCorpus, open_tune_corpus
from minicpm.train.tune_plan import Base, make_tune_plan
from minicpm.train.tune_start import check_same_run
from minicpm.train.work import Work

TuneReady = Ready[TuneConfig, TuneCorpus]


def prepare_tuning(
    config: TuneConfig,
    base: Checkpoint,
    run: Path,
    start: Start,
    say: Callable[[str], None],
    memory_bytes: int = 0,
) -> TuneReady:
    """Return the run with its rows read, its plan made and its disk checked; no model is built.

    Args:
        config: of the run.
        base: the model that is tuned, open.
        run: its folder.
        start: its own newest checkpoint, or nothing.
        say: writes a line for the person.
        memory_bytes: what it may take; 0 is what is free.

    Raises:
        MiniCPMError: whatever cannot be used, in one line.
    """
    if config.batch.sequence_length > base.config.max_position_embeddings:
        raise ConfigError(
            f"batch.sequence_length {config.batch.sequence_length} exceeds the model's "
            f"{base.config.max_position_embeddings} positions"
        )
    if config.method == "full" and any(kind not in _FLOATS for kind in base.weights.block_types()):
        say(f"{base.path} holds {base.dtype_summary}: full tuning decodes it and writes {config.loop.dtype}")
    device = choose_device(config.loop.device)
    run.mkdir(parents=True, exist_ok=True)
    corpus = open_tune_corpus(config, base, run, say)
    config = config.with_steps(corpus.num_rows)
    loop = config.loop if config.method == "full" else dataclasses.replace(config.loop, compile="off")
    arithmetic = choose_arithmetic(loop, config.schedule.total_steps, device, say)
    if start.manifest is not None:
        config = check_same_run(config, start, corpus.tokenizer_hash)
        if corpus.shards is not None:
            check_identity({"rows": corpus.shards["rows"]}, start.manifest.run.get("data", {}))
        elif start.manifest.run.get("data") != corpus.identity:
            raise CheckpointError("the rows are not those that this run began with; bring them back, or begin another")
    plan = make_tune_plan(
        Base.of(base), config, is_compiled=arithmetic.is_compiled, is_widened=arithmetic.is_widened,
        memory_bytes=memory_bytes or available_bytes(), peak_flops=arithmetic.peak_flops,
    )  # fmt: skip
    check_disk(run, plan)
    parent, folder = parent_of(base.path)
    start = start if start.manifest is not None else dataclasses.replace(start, parent=parent)
    batch = dataclasses.replace(config.batch, micro_sequences=plan.micro_sequences)
    config = dataclasses.replace(config, batch=batch, loop=arithmetic.decide(loop))
    return Ready(config, run, start, corpus, plan, arithmetic, device, folder, base)


_FLOATS = ("F32", "F16", "BF16")


def make_tune_state(
    config: TuneConfig, base: Checkpoint, device: torch.device, start: Start | None = None
) -> TrainState:
    """Return the model and optimizer at the run's start."""
    loop, dtype = config.loop, DTYPES[config.loop.dtype]
    if config.method == "full":
        # Float32 first: masters then begin at what the file says, unrounded.
        first = torch.float32 if config.optimizer.masters == "float32" else dtype
        model = load_model(base.config, base.weights, dtype=first, device=device)
        state = wrap_state(model, config.optimizer, loop.dtype, loop.seed)
    else:
        if config.method == "lora":
            model = load_model(base.config, base.weights, dtype=dtype, device=device)
        else:
            model = load_quantized(base.config, base.weights, config.block_type, dtype, device)
        name = str(base.path.resolve())
        state = adapter_state(model, config.optimizer, config.lora, loop.dtype, loop.seed, name)
    state.model.checkpoint_every = loop.recompute_every
    if start is not None and start.folder is not None:
        state.load(*checkpoint.read_tensors(start.folder))
        state.step = start.step
    return state


def tune(ready: TuneReady, say: Callable[[str], None], hooks: Sequence[Hook] = ()) -> tuple[LoopEnd, int]:
    """Train until the schedule ends or somebody stops it; return where, and the exit code (0, 130 or 143).

    Raises:
        TrainingStopped: a loss that is not finite; the dump lies in the run's folder.
        CheckpointError: the last checkpoint could not be written.
    """
    config, corpus = ready.config, ready.corpus
    assert ready.base is not None
    state = make_tune_state(config, ready.base, ready.device, ready.start)
    if corpus.answers is not None:
        answers = AnswerWork(ready, state, say)
        work: Work[Any] = answers.work
        measurement = answers.measurement
        close: Callable[[], None] = answers.batches.close
    else:
        assert corpus.stream is not None
        batches = StepBatches(corpus.stream.batch, config.batch, config.schedule.total_steps, Ranks(), workers=1)
        loss = pretraining_loss(ready.device, ready.arithmetic.is_compiled, ready.arithmetic.is_widened)
        work = Work(
            batches, lambda batch: float(batch.num_targets), loss, lambda batch: batch.input_ids.size, identify, "sft"
        )
        measurement = heldout_measurement(corpus.heldout, config, loss)
        close = batches.close
    # Before preference tuning every ratio is 1, every margin 0.
    if measurement is not None and state.step == 0 and corpus.answers is None:
        say(f"before tuning: {measurement.describe(measurement.measure(state))}")
    return run_work(ready, state, work, say, measurement=measurement, hooks=hooks, close=close)
