from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from minicpm import config as configuration
from minicpm.data.mixture import Mix, RowOrder, Span, StageMixture, stage_mixture
from minicpm.data.packing import RowPlan
from minicpm.errors import ConfigError, DataError


def plan(num_rows: int, tokens_per_row: int = 16) -> RowPlan:
    starts = np.arange(num_rows, dtype=np.int64) * 100
    lengths = np.full(num_rows, tokens_per_row, np.int32)
    return RowPlan(starts, lengths, np.arange(num_rows + 1, dtype=np.int64), num_rows * tokens_per_row)


def mixture(name: str = "stable", **weights: float) -> StageMixture:
    return StageMixture(tuple(Mix(source, weight) for source, weight in weights.items()), name)


PLANS = {"web": plan(50), "code": plan(7), "half": plan(40, 8)}


def test_shares_are_shares_of_tokens_over_any_stretch() -> None:
    # Rows of `half` are half as full, so it needs twice the rows: 0.5·16 : 0.25·16 : 0.25·8 in rows is 2 : 1 : 2.
    order = RowOrder([Span(0, mixture(web=0.5, code=0.25, half=0.25))], PLANS, seed=1)
    for first in (0, 777, 65_530, 10**12):
        places = order.places(first, 1000)
        tokens: Counter[str] = Counter()
        for place in places:
            tokens[order.names[place.source]] += order.plans[place.source].lengths[0]
        total = sum(tokens.values())
        assert tokens["web"] / total == pytest.approx(0.5, abs=0.002)
        assert tokens["code"] / total == pytest.approx(0.25, abs=0.002)
        assert tokens["half"] / total == pytest.approx(0.25, abs=0.002)


def test_sources_take_turns() -> None:
    order = RowOrder([Span(0, mixture(web=0.75, code=0.25))], PLANS, seed=1)
    sources = [p.source for p in order.places(0, 40)]
    assert all(sources[i : i + 4].count(1) == 1 for i in range(0, 40, 4))


def test_each_epoch_holds_every_row_once_in_an_order_of_its_own() -> None:
    order = RowOrder([Span(0, mixture(web=0.5, code=0.5))], PLANS, seed=1)
    rows = [p.row for p in order.places(0, 42) if order.names[p.source] == "code"]
    assert [sorted(rows[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert rows[:7] != rows[7:14]
    epochs = [p.epoch for p in order.places(0, 42) if order.names[p.source] == "code"]
    assert epochs == [0] * 7 + [1] * 7 + [2] * 7
    assert order.epochs(42) == {"web": 21 / 50, "code": 3.0}


def test_a_later_stage_goes_on_where_the_earlier_one_stopped() -> None:
    stages = [Span(0, mixture(web=0.8, code=0.2)), Span(100, mixture("decay", code=0.5, half=0.5))]
    order = RowOrder(stages, PLANS, seed=1)
    alone = RowOrder(stages[:1], PLANS, seed=1)
    assert order.places(0, 100) == alone.places(0, 100)
    rows = [(p.epoch, p.row) for p in order.places(0, 200) if order.names[p.source] == "code"]
    numbers = [epoch for epoch, _ in rows]
    assert numbers == sorted(numbers)
    # 20 rows of the first stage, and a third of the second, where `half` needs two rows for as many tokens.
    # No row comes twice before all were seen, across the border too.
    assert len(rows) == 20 + 33
    assert all(len(set(rows[i : i + 7])) == 7 for i in range(0, 49, 7))
    assert order.epochs(200)["code"] == 53 / 7
    assert order.epochs(100)["half"] == 0


def test_reaching_far_rows_needs_no_replay() -> None:
    order = RowOrder([Span(0, mixture(web=0.5, code=0.5))], PLANS, seed=1)
    place = order.places(10**15, 1)[0]
    assert place.epoch == 10**15 // 2 // (50 if order.names[place.source] == "web" else 7)


def test_seed_and_name_decide_the_order() -> None:
    def rows(seed: int, name: str) -> list[int]:
        return [p.row for p in RowOrder([Span(0, mixture(**{name: 1.0}))], {name: plan(50)}, seed).places(0, 50)]

    assert rows(1, "a") == rows(1, "a")
    assert len({tuple(rows(1, "a")), tuple(rows(2, "a")), tuple(rows(1, "b"))}) == 3


def test_tiny_weights_are_not_forgotten() -> None:
    order = RowOrder([Span(0, mixture(web=1 - 1e-6, code=1e-6))], PLANS, seed=1)
    assert order.epochs(1 << 16)["code"] == pytest.approx(1 / 7)


def test_limits_of_epochs() -> None:
    stage = StageMixture((Mix("web", 0.5), Mix("code", 0.5, max_epochs=2)))
    order = RowOrder([Span(0, stage)], PLANS, seed=1)
    order.check_epochs(28)
    with pytest.raises(DataError, match=r"code 2\.14 times, its max_epochs is 2"):
        order.check_epochs(30)


def test_stages_without_a_mixture_take_the_one_before() -> None:
    stable, decay = mixture("stable", web=1.0), mixture("decay", code=1.0)
    named = {s: stage_mixture([stable, decay], s).name for s in ("warmup", "stable", "decay", "tail")}
    assert named == {"warmup": "stable", "stable": "stable", "decay": "decay", "tail": "decay"}
    assert stage_mixture([stable], "decay") is stable
    with pytest.raises(ConfigError, match="did you mean decay"):
        stage_mixture([mixture("decai", web=1.0)], "stable")
    with pytest.raises(ConfigError, match="two stages have the name 'stable'"):
        stage_mixture([stable, stable], "stable")
    with pytest.raises(ConfigError, match="names no data"):
        stage_mixture([], "stable")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mix": []}, "has no mix"),
        ({"mix": [{"name": "a", "weight": 0.5}]}, r"weights of stage stable sum to 0\.5, not 1 \(a\)"),
        ({"mix": [{"name": "a", "weight": 0.5}, {"name": "a", "weight": 0.5}]}, "'a' twice"),
        ({"mix": [{"name": "a", "weight": -1.0}]}, "weight of a must be a positive share"),
        ({"mix": [{"name": "a", "weight": 1.0, "max_epochs": -1}]}, "max_epochs of a must not be negative"),
        ({"mix": [{"name": "", "weight": 1.0}]}, "name of a mix must not be empty"),
        ({"mix": [{"name": "a", "wieght": 1.0}]}, r"unknown field mix\[0\]\.wieght; did you mean mix\[0\]\.weight"),
    ],
)
def test_bad_mixtures_say_what_is_wrong(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration.build(StageMixture, data)


def test_weights_may_be_normalised_on_request() -> None:
    stage = StageMixture((Mix("a", 3), Mix("b", 1)), normalise=True)
    assert stage.shares == {"a": 0.75, "b": 0.25}


def test_unknown_sources_and_wrong_spans() -> None:
    with pytest.raises(ConfigError, match="mixture name 'wed' is unknown; there are web, code, half"):
        RowOrder([Span(0, mixture(wed=1.0))], PLANS, 1)
    with pytest.raises(ConfigError, match="must begin at rows 0"):
        RowOrder([Span(5, mixture(web=1.0))], PLANS, 1)
