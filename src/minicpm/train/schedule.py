"""The learning rate, the stage and the batch size of every step: pure functions of (settings, step).

Warm-up–stable–decay with three shapes of decay, and the cosine baselines that the report compares it with. What this
leaves out: which parameter gets which share of the rate (`optim`), and the mixture of a stage (`data`).

Source: MiniCPM technical report (arXiv 2404.06395) §4.3 and §3.3; the ModelBest training code's schedulers
(WarmupStableExp, WarmupStableDrop, Cosine); Hägele et al. (arXiv 2405.18392) for 1-sqrt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from minicpm.errors import ConfigError

Stage = Literal["warmup", "stable", "decay", "tail"]
STAGES: tuple[Stage, ...] = ("warmup", "stable", "decay", "tail")
# The released 2B run decayed for 18,500 steps with a half-life of 5,000: 3.7 half-lives, down to 7.7 %.
HALF_LIVES_PER_DECAY = 3.7


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves; a length below 1 is a share of `total_steps`, else a number of steps.

    Attributes:
        kind: `wsd-exp` halves the rate every `half_life`; `wsd-linear` and `wsd-sqrt` (1-√) end at `floor`; `cosine`
            falls over `cosine` steps and stays at the floor, `cosine-loop` starts again; `constant` only warms up.
        lr: the peak rate of the base group (embedding, head, norms); matrices get it divided by hidden/dim_model_base.
        total_steps: the last update.
        warmup: length of the linear rise from 0.
        decay: length of the decay, which ends `tail` steps before `total_steps`.
        tail: steps after the decay; `wsd-exp` goes on falling there, the others stay at the floor.
        half_life: of `wsd-exp`; 0 means decay/3.7, as in the released run.
        floor: the share of the peak at the end; None means 0.1 for linear and cosine, 0 for 1-√. `wsd-exp` has none.
        cosine: length of one cosine; 0 means `total_steps`.
        rewarm_begin: the step that a branch started from.
        rewarm: steps over which a branch rises from 0 to the schedule's own rate.
    """

    total_steps: int
    lr: float = 0.01
    kind: Literal["wsd-exp", "wsd-linear", "wsd-sqrt", "cosine", "cosine-loop", "constant"] = "wsd-exp"
    warmup: float = 0.01
    decay: float = 0.1
    tail: float = 0.0
    half_life: float = 0.0
    floor: float | None = None
    cosine: float = 0.0
    rewarm_begin: int = 0
    rewarm: int = 0

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ConfigError(f"total_steps must be at least 1, got {self.total_steps}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr must be a positive number, got {self.lr}")
        for name in ("warmup", "decay", "tail", "half_life", "cosine", "rewarm_begin", "rewarm"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.floor is not None and not 0 <= self.floor <= 1:
            raise ConfigError(f"floor must lie between 0 and 1, got {self.floor}")
        if self.kind.startswith("wsd") and self.warmup_steps + self.decay_steps + self.tail_steps > self.total_steps:
            raise ConfigError(
                f"warmup {self.warmup_steps} + decay {self.decay_steps} + tail {self.tail_steps} steps exceed "
                f"total_steps {self.total_steps}"
            )

    def steps_of(self, length: float) -> int:
        """Return `length` in steps: a share of `total_steps` when below 1."""
        return round(length * self.total_steps) if length < 1 else round(length)

    @property
    def warmup_steps(self) -> int:
        """Steps of the rise."""
        return self.steps_of(self.warmup)

    @property
    def decay_steps(self) -> int:
        """Steps of the decay; 0 for schedules without one."""
        return self.steps_of(self.decay) if self.kind.startswith("wsd") else 0

    @property
    def tail_steps(self) -> int:
        """Steps after the decay."""
        return self.steps_of(self.tail) if self.kind.startswith("wsd") else 0

    @property
    def decay_end(self) -> int:
        """The last step of the decay."""
        return self.total_steps - self.tail_steps

    @property
    def decay_begin(self) -> int:
        """The last step of the stable stage, which still has the full rate."""
        return self.decay_end - self.decay_steps

    @property
    def final_share(self) -> float:
        """The floor with its default filled in."""
        if self.floor is not None:
            return self.floor
        return 0.0 if self.kind == "wsd-sqrt" else 0.1


def lr(schedule: ScheduleConfig, step: int) -> float:
    """Return the base group's learning rate of update `step` (the first update is 1)."""
    return schedule.lr * lr_factor(schedule, step)


def lr_factor(schedule: ScheduleConfig, step: int) -> float:
    """Return the share of the peak rate at update `step`, in [0, 1].

    Source: report §4.3: s/W for s < W; 1 for W ≤ s ≤ T; f(s − T) after T, where T is the START of the decay.
    """
    factor = 1.0
    if schedule.rewarm and schedule.rewarm_begin <= step < schedule.rewarm_begin + schedule.rewarm:
        factor = (step - schedule.rewarm_begin) / schedule.rewarm
    if step < schedule.warmup_steps:
        return factor * step / schedule.warmup_steps
    if schedule.kind.startswith("wsd"):
        return factor * _decay_factor(schedule, step)
    if schedule.kind.startswith("cosine"):
        return factor * _cosine_factor(schedule, step)
    return factor


def _decay_factor(schedule: ScheduleConfig, step: int) -> float:
    since = step - schedule.decay_begin
    if since <= 0 or not schedule.decay_steps:
        return 1.0
    if schedule.kind == "wsd-exp":
        half_life = schedule.steps_of(schedule.half_life) or schedule.decay_steps / HALF_LIVES_PER_DECAY
        return float(0.5 ** (since / half_life))
    progress = min(since / schedule.decay_steps, 1.0)
    fall = progress if schedule.kind == "wsd-linear" else math.sqrt(progress)
    return schedule.final_share + (1 - schedule.final_share) * (1 - fall)


def _cosine_factor(schedule: ScheduleConfig, step: int) -> float:
    end = schedule.steps_of(schedule.cosine) or schedule.total_steps
    length = max(end - schedule.warmup_steps, 1)
    progress = (step - schedule.warmup_steps) / length
    if schedule.kind == "cosine-loop":
        progress = progress % 1.0
    floor = schedule.final_share
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def stage(schedule: ScheduleConfig, step: int) -> Stage:
    """Return the stage that update `step` belongs to; a checkpoint carries the stage of its last update."""
    if step < schedule.warmup_steps:
        return "warmup"
    if step <= schedule.decay_begin or not schedule.decay_steps:
        return "stable"
    return "decay" if step <= schedule.decay_end else "tail"


def stage_bounds(schedule: ScheduleConfig) -> list[tuple[Stage, int, int]]:
    """Return (stage, first step, last step) of every stage that has a step, in order."""
    warm, begin, end = schedule.warmup_steps, schedule.decay_begin, schedule.decay_end
    spans: list[tuple[Stage, int, int]] = [
        ("warmup", 1, warm - 1),
        ("stable", max(warm, 1), begin),
        ("decay", begin + 1, end),
        ("tail", end + 1, schedule.total_steps),
    ]
    return [(name, first, last) for name, first, last in spans if first <= last]


def stage_line(schedule: ScheduleConfig, step: int) -> str:
    """Return where `step` stands, for people: "stable 61% → decay starts at step 261000"."""
    spans = stage_bounds(schedule)
    name = stage(schedule, step)
    for index, (span, first, last) in enumerate(spans):
        if span == name:
            percent = 100 * (step - first + 1) // (last - first + 1)
            following = f" → {spans[index + 1][0]} starts at step {spans[index + 1][1]}" if spans[index + 1 :] else ""
            return f"{name} {percent}%{following}"
    return name


def critical_batch_tokens(loss: float) -> float:
    """Return the batch size in tokens at which a model with C4 loss `loss` (nats a token) trains best.

    Source: report §3.3: bs = 1.21e9 / L^6.24, fitted on models of 9 M to 170 M parameters.
    """
    if not loss > 0:
        raise ConfigError(f"the batch law needs a positive loss in nats a token, got {loss}")
    return float(1.21e9 / loss**6.24)


def batch_sequences(ramp: tuple[int, ...], ramp_steps: int, step: int) -> int:
    """Return the sequences in the batch of update `step`: the ramp's sizes for `ramp_steps` steps each, then the last.

    A single size is a constant batch. The 1.2B model of the report went from 2 M to 4 M tokens this way.
    """
    if ramp_steps < 1:
        return ramp[-1]
    return ramp[min((step - 1) // ramp_steps, len(ramp) - 1)]
