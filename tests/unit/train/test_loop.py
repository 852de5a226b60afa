"""The loop: normalisation, order of saving, stopping, and a dump instead of a number that is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minicpm.architecture import ModelConfig
from minicpm.train.loop import StepRecord, TrainingStopped, train
from minicpm.train.optim import OptimizerConfig
from minicpm.train.schedule import ScheduleConfig
from minicpm.train.state import TrainState, new_state
from minicpm.train.work import Work

MakeWork = Callable[..., Work[Any]]
SCHEDULE = ScheduleConfig(total_steps=6, warmup=2, decay=2)


def fresh(config: ModelConfig, dtype: str = "float32") -> TrainState:
    return new_state(config, OptimizerConfig(), 5, dtype, torch.device("cpu"))


def run(state: TrainState, work: Any, schedule: ScheduleConfig = SCHEDULE, **more: Any) -> list[StepRecord]:
    records: list[StepRecord] = []
    train(
        state,
        work,
        schedule,
        save=more.pop("save", lambda state, record: None),
        is_save_due=more.pop("is_save_due", lambda step: False),
        hooks=[lambda state, record: records.append(record)],
        **more,
    )
    return records


def test_micro_batches_do_not_change_the_loss(two_layers: ModelConfig, make_tiny_work: MakeWork) -> None:
    schedule = ScheduleConfig(total_steps=20, warmup=4, decay=6)
    runs = [run(fresh(two_layers), make_tiny_work(two_layers, micro), schedule) for micro in (8, 4, 2, 1)]
    for other in runs[1:]:
        # Measured 1e-7 and 2e-6.
        assert other[0].loss == pytest.approx(runs[0][0].loss, rel=1e-6)
        for ours, theirs in zip(other, runs[0], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.means["loss/a"] == pytest.approx(ours.loss, rel=1e-5)
    assert runs[0][-1].loss != runs[0][0].loss


def test_records_say_stage_rate_and_tokens(two_layers: ModelConfig, make_tiny_work: MakeWork) -> None:
    records = run(fresh(two_layers), make_tiny_work(two_layers))
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r.stage for r in records] == ["warmup", "stable", "stable", "stable", "decay", "decay"]
    assert records[0].lr == pytest.approx(0.005)
    assert all(r.tokens == 88 and r.grad_norm > 0 and math.isfinite(r.loss) for r in records)


def test_saved_before_hooks_and_when_asked_to_stop(two_layers: ModelConfig, make_tiny_work: MakeWork) -> None:
    events: list[str] = []
    state = fresh(two_layers)
    end = train(
        state,
        make_tiny_work(two_layers),
        SCHEDULE,
        save=lambda s, r: events.append(f"save {r.step}"),
        is_save_due=lambda step: step == 2,
        hooks=[lambda s, r: events.append(f"hook {r.step}")],
        is_stop_asked=lambda: state.step == 3,
    )
    assert events == ["hook 1", "save 2", "hook 2", "hook 3", "save 3"]
    assert (end.step, end.was_asked) == (3, True)


def test_stops_at_the_first_number_that_is_none(two_layers: ModelConfig, make_tiny_work: MakeWork) -> None:
    state = fresh(two_layers)
    seen: list[dict[str, Any]] = []

    def on_failure(state: TrainState, facts: dict[str, Any]) -> str:
        seen.append(facts)
        return "last good: step_000002"

    with pytest.raises(TrainingStopped, match=r"step 3: the loss is nan.*step_000002"):
        run(state, make_tiny_work(two_layers, micro=4, poison=3), on_failure=on_failure)
    assert state.step == 2
    assert seen[0]["batches"] == [{"step": 3, "rows": 4}] * 2
    assert seen[0]["first_bad_weight"] is None
    assert "model.layers.1.mlp.up_proj.weight" in seen[0]["weights"]


def test_a_broken_weight_is_named(two_layers: ModelConfig, make_tiny_work: MakeWork) -> None:
    state = fresh(two_layers)
    seen: list[dict[str, Any]] = []
    with torch.no_grad():
        state.model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(TrainingStopped):
        run(state, make_tiny_work(two_layers), on_failure=lambda state, facts: seen.append(facts) or "")
    assert seen[0]["first_bad_weight"] == "model.layers.1.mlp.up_proj.weight"
    assert seen[0]["weights"]["model.layers.1.mlp.up_proj.weight"]["not_finite"] == 1


def test_same_start_same_bits(two_layers: ModelConfig, make_tiny_work: MakeWork) -> None:
    one, two = fresh(two_layers, "bfloat16"), fresh(two_layers, "bfloat16")
    assert [r.loss for r in run(one, make_tiny_work(two_layers))] == [
        r.loss for r in run(two, make_tiny_work(two_layers))
    ]
    for name, tensor in one.optimizer.tensors().items():
        assert torch.equal(tensor, two.optimizer.tensors()[name]), name


def test_half_precision_scales_the_loss_until_it_fits(two_layers: ModelConfig, make_tiny_work: MakeWork) -> None:
    expected = run(fresh(two_layers), make_tiny_work(two_layers))
    state = fresh(two_layers, "float16")
    assert next(state.model.parameters()).dtype == torch.float16
    state.optimizer.scale = 2.0**40
    found = run(state, make_tiny_work(two_layers))
    # The first gradients overflowed: the same batch ran again with smaller scales, and no step was left out.
    assert state.optimizer.scale < 2.0**40
    assert [record.step for record in found] == [record.step for record in expected]
    for ours, exact in zip(found, expected, strict=True):
        assert ours.loss == pytest.approx(exact.loss, rel=3e-3)
        assert ours.grad_norm == pytest.approx(exact.grad_norm, rel=0.05)
    # What is scaled is kept with the run.
    again = fresh(two_layers, "float16")
    again.load(state.weights(), {name: tensor.clone() for name, tensor in state.tensors().items()})
    assert again.optimizer.scale == state.optimizer.scale
