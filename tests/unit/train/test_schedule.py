"""The schedules by hand-worked tables; the released 2B run is one of them."""

from __future__ import annotations

import itertools
import math

import pytest

from minicpm.errors import ConfigError
from minicpm.train import schedule
from minicpm.train.schedule import ScheduleConfig

RELEASED = ScheduleConfig(
    kind="wsd-exp", lr=0.01, total_steps=280000, warmup=2000, decay=18500, tail=500, half_life=5000
)


def test_released_run() -> None:
    assert RELEASED.decay_begin == 261000
    assert RELEASED.decay_end == 279500
    assert schedule.lr(RELEASED, 1000) == pytest.approx(0.005)
    assert schedule.lr(RELEASED, 261000) == 0.01
    assert schedule.lr(RELEASED, 266000) == pytest.approx(0.005)
    assert schedule.lr(RELEASED, 279500) / schedule.lr(RELEASED, 261000) == pytest.approx(0.076947, abs=5e-7)
    steps = (1, 1999, 2000, 261000, 261001, 279500, 279501, 280000)
    stages = [schedule.stage(RELEASED, s) for s in steps]
    assert stages == ["warmup", "warmup", "stable", "stable", "decay", "decay", "tail", "tail"]
    assert schedule.lr(RELEASED, 280000) < schedule.lr(RELEASED, 279500)


def test_default_half_life_is_that_of_the_released_run() -> None:
    plain = ScheduleConfig(total_steps=280000, warmup=2000, decay=18500, tail=500)
    assert schedule.lr(plain, 270000) == pytest.approx(schedule.lr(RELEASED, 270000), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "floor", "table"),
    [
        # warm-up 10 of 100 steps, decay 20 steps from step 80.
        ("wsd-linear", None, {1: 0.1, 5: 0.5, 10: 1, 80: 1, 85: 0.775, 90: 0.55, 100: 0.1, 120: 0.1}),
        ("wsd-linear", 0.0, {85: 0.75, 100: 0.0}),
        ("wsd-sqrt", None, {80: 1, 85: 0.5, 100: 0.0}),
        ("wsd-sqrt", 0.2, {85: 0.6, 100: 0.2}),
        ("cosine", None, {5: 0.5, 10: 1, 55: 0.55, 100: 0.1, 130: 0.1}),
        ("cosine", 0.0, {40: 0.75, 55: 0.5, 70: 0.25, 100: 0.0}),
        ("constant", None, {5: 0.5, 10: 1, 100: 1}),
    ],
)
def test_table(kind: str, floor: float | None, table: dict[int, float]) -> None:
    config = ScheduleConfig(kind=kind, floor=floor, lr=1.0, total_steps=100, warmup=0.1, decay=0.2)
    for step, expected in table.items():
        assert schedule.lr(config, step) == pytest.approx(expected, abs=1e-12), step


def test_cosine_of_half_the_run_and_its_loop() -> None:
    once = ScheduleConfig(kind="cosine", lr=1.0, total_steps=200, warmup=10, cosine=110)
    loop = ScheduleConfig(kind="cosine-loop", lr=1.0, total_steps=200, warmup=10, cosine=110)
    assert [schedule.lr(once, s) for s in (60, 110, 160)] == pytest.approx([0.55, 0.1, 0.1])
    # The loop is at its peak again one period (100 steps) later, and in the middle after half of one.
    assert [schedule.lr(loop, s) for s in (10, 60, 110, 160)] == pytest.approx([1.0, 0.55, 1.0, 0.55])


def test_rewarm_after_a_branch() -> None:
    config = ScheduleConfig(lr=1.0, total_steps=100, warmup=0, decay=0, rewarm_begin=40, rewarm=10)
    assert [schedule.lr(config, s) for s in (39, 41, 45, 50, 60)] == pytest.approx([1, 0.1, 0.5, 1, 1])


def test_rate_never_jumps() -> None:
    for kind in ("wsd-exp", "wsd-linear", "wsd-sqrt", "cosine", "constant"):
        config = ScheduleConfig(kind=kind, lr=1.0, total_steps=1000, warmup=100, decay=200)
        rates = [schedule.lr(config, s) for s in range(1001)]
        # 1-sqrt falls fastest in its first step: 1 - √(1/200).
        assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= math.sqrt(1 / 200) + 1e-12
        assert min(rates) >= 0
        assert max(rates) == 1


def test_a_branch_decays_like_a_run_that_decayed_there() -> None:
    straight = ScheduleConfig(lr=1.0, total_steps=60, warmup=10, decay=20)
    longer = ScheduleConfig(lr=1.0, total_steps=400, warmup=10, decay=40)
    assert [schedule.lr(straight, s) for s in range(41)] == [schedule.lr(longer, s) for s in range(41)]


def test_stage_line_and_bounds() -> None:
    assert schedule.stage_line(RELEASED, 160000).startswith("stable 61% → decay starts at step 261001")
    spans = schedule.stage_bounds(RELEASED)
    assert [s[0] for s in spans] == list(schedule.STAGES)
    assert sum(last - first + 1 for _, first, last in spans) == RELEASED.total_steps
    for name, first, last in spans:
        assert schedule.stage(RELEASED, first) == schedule.stage(RELEASED, last) == name


def test_batch_law_and_ramp() -> None:
    table = {3.5: 0.49e6, 3.0: 1.28e6, 2.6: 3.1e6, 2.506: 3.93e6, 2.4: 5.1e6}
    for loss, tokens in table.items():
        assert schedule.critical_batch_tokens(loss) == pytest.approx(tokens, rel=0.02)
    assert [schedule.batch_sequences((4, 8), 10, s) for s in (1, 10, 11, 500)] == [4, 4, 8, 8]
    assert schedule.batch_sequences((6,), 0, 3) == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"total_steps": 0},
        {"total_steps": 10, "lr": 0.0},
        {"total_steps": 10, "lr": float("nan")},
        {"total_steps": 10, "warmup": -1},
        {"total_steps": 10, "floor": 1.5},
        {"total_steps": 10, "warmup": 6, "decay": 6},
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ScheduleConfig(**fields)
