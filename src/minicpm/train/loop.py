"""The one training loop: pretraining, supervised and preference tuning all run through it.

    for every step: the batch (a function of the step) → micro-batches → gradients, summed in float32
                    → clip → update → record → checkpoint, if due → hooks → stop, if asked

What this leaves out: the data and the loss (`work`), files (`checkpoint`, called through `save`), and whatever a hook
does: measuring held-out text, samples, plots.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from minicpm.errors import MiniCPMError
from minicpm.train import schedule as schedules
from minicpm.train.failure import dump_failure
from minicpm.train.flops import synchronize
from minicpm.train.schedule import ScheduleConfig
from minicpm.train.settings import Ranks
from minicpm.train.state import TrainState
from minicpm.train.work import Work, add_sums


class TrainingStopped(MiniCPMError):
    """The run cannot go on; the message says why, where the dump is, and which checkpoint is good."""


@dataclass
class StepRecord:
    """What one update was: the line on the screen and in `metrics.jsonl`.

    `loss` is the mean over the whole global batch, in nats a target token; `means` are the named parts.
    """

    step: int
    stage: str
    lr: float
    loss: float
    grad_norm: float
    tokens: int
    seconds: float
    means: dict[str, float] = field(default_factory=dict)


@dataclass
class LoopEnd:
    """Where the loop stopped, the last record, and whether somebody asked for it."""

    step: int
    last: StepRecord | None
    was_asked: bool


# Called after every step.
Hook = Callable[[TrainState, StepRecord], None]


def train(
    state: TrainState,
    work: Work[Any],
    schedule: ScheduleConfig,
    *,
    save: Callable[[TrainState, StepRecord], None],
    is_save_due: Callable[[int], bool],
    hooks: Sequence[Hook] = (),
    is_stop_asked: Callable[[], bool] = lambda: False,
    on_failure: Callable[[TrainState, dict[str, Any]], str] = lambda state, facts: "",
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
) -> LoopEnd:
    """Update `state` until `schedule.total_steps`, or until somebody asks to stop.

    A checkpoint is saved before any hook runs: what is measured afterwards may fail without loss. On a request the
    current step is finished and saved. The same state, work and schedule give the same bits.

    Raises:
        TrainingStopped: a loss or gradient that is not finite; nothing was updated by it.
    """
    record: StepRecord | None = None
    saved = state.step
    while state.step < schedule.total_steps:
        if is_stop_asked():
            break
        record = update_once(state, work, schedule, state.step + 1, on_failure, ranks)
        if is_save_due(state.step):
            save(state, record)
            saved = state.step
        for hook in hooks:
            hook(state, record)
    was_asked = state.step < schedule.total_steps
    if was_asked and record is not None and saved != state.step:
        save(state, record)
    return LoopEnd(state.step, record, was_asked)


def update_once(
    state: TrainState,
    work: Work[Any],
    schedule: ScheduleConfig,
    step: int,
    on_failure: Callable[[TrainState, dict[str, Any]], str],
    ranks: Ranks,
) -> StepRecord:
    """Make update `step` and return its record.

    Raises:
        TrainingStopped: a loss or gradient that is not finite.
    """
    start = time.perf_counter()
    batches = work.batches(step)
    # A batch without a single target (all prompts cut off) moves nothing but the weight decay; 0/0 would end the run.
    weight = max(all_sum([work.weight(batch) for batch in batches], ranks), 1.0)
    state.model.train()
    lr = schedules.lr(schedule, step)
    while True:
        state.optimizer.begin(lr)
        loss, sums = _forward_and_backward(state, work, batches, weight, step, on_failure)
        reduce_gradients(state, ranks)
        norm = state.optimizer.update(lr)
        if math.isfinite(norm):
            break
        # Half precision overflowed: the same batch again with a smaller scale, nothing has moved.
        if not state.optimizer.shrink_scale():
            _stop(state, work, batches, step, f"the gradient norm is {norm}", on_failure)
    state.step = step
    synchronize(state.device)
    return StepRecord(
        step=step,
        stage=work.stage or schedules.stage(schedule, step),
        lr=lr,
        loss=all_sum([loss], ranks),
        grad_norm=norm,
        tokens=int(all_sum([work.tokens(batch) for batch in batches], ranks)),
        seconds=time.perf_counter() - start,
        means={name: value / count for name, (value, count) in sums.items() if count},
    )


def _forward_and_backward(
    state: TrainState,
    work: Work[Any],
    batches: Sequence[Any],
    weight: float,
    step: int,
    on_failure: Callable[[TrainState, dict[str, Any]], str],
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Return the loss and the named sums of a step's micro-batches; their gradients lie with the optimizer."""
    loss, scale = 0.0, state.optimizer.scale
    sums: dict[str, tuple[float, float]] = {}
    for batch in batches:
        parts = work.loss(state.model, batch, scale / weight)
        value = float(parts.total.detach()) / scale
        if not math.isfinite(value):
            _stop(state, work, batches, step, f"the loss is {value}", on_failure)
        parts.total.backward()
        loss += value
        add_sums(sums, parts.sums)
    return loss, sums


def all_sum(values: Sequence[float], ranks: Ranks) -> float:
    """Return the sum over all `values` of all processes; every process gets the same."""
    total = math.fsum(values)
    if ranks.world == 1:
        return total
    tensor = torch.tensor(total, dtype=torch.float64)
    torch.distributed.all_reduce(tensor)
    return float(tensor)


def reduce_gradients(state: TrainState, ranks: Ranks) -> None:
    """Make every process hold the sum of all processes' gradients; their losses have the global factor already."""
    if ranks.world > 1:
        for grad in state.optimizer.ready_grads().values():
            torch.distributed.all_reduce(grad)


def _stop(
    state: TrainState,
    work: Work[Any],
    batches: Sequence[Any],
    step: int,
    reason: str,
    on_failure: Callable[[TrainState, dict[str, Any]], str],
) -> None:
    facts = dump_failure(state, step, reason, [work.identify(batch) for batch in batches])
    state.optimizer.forget()
    when = "in the middle of the update" if state.optimizer.config.is_fused else "before the update"
    raise TrainingStopped(f"step {step}: {reason}; the run stopped {when}. {on_failure(state, facts)}".strip())
