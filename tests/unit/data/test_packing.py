from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest

from minicpm.data.packing import RowPlan, plan_rows
from minicpm.data.shards import TokenShards
from minicpm.errors import DataError

MakeShards = Callable[..., TokenShards]


def segments(plan: RowPlan) -> list[list[tuple[int, int]]]:
    bounds = plan.row_bounds.tolist()
    pairs = list(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True))
    return [pairs[a:b] for a, b in itertools.pairwise(bounds)]


def test_every_input_stands_once_and_rows_fit(make_shards: MakeShards) -> None:
    lengths = [2, 9, 30, 5, 3, 17, 16, 33, 2, 12]
    shards = make_shards(lengths)
    plan = plan_rows(shards, 16, keeps=False)
    covered: list[int] = []
    for row in segments(plan):
        assert 0 < sum(length for _, length in row) <= 16
        for start, length in row:
            covered += range(start, start + length)
    ends = np.cumsum(lengths)
    last_of_document = set((ends - 1).tolist())
    assert sorted(covered) == [i for i in range(sum(lengths)) if i not in last_of_document]
    assert plan.num_inputs == sum(lengths) - len(lengths)


def test_a_document_of_one_more_than_a_row_is_one_row(make_shards: MakeShards) -> None:
    plan = plan_rows(make_shards([17, 17]), 16, keeps=False)
    assert [[length for _, length in row] for row in segments(plan)] == [[16], [16]]


def test_best_fit_fills_rows(make_shards: MakeShards) -> None:
    # Inputs 10, 6, 9, 7, 8, 8 make three rows of 16 exactly, however they are scrambled.
    plan = plan_rows(make_shards([11, 7, 10, 8, 9, 9]), 16, keeps=False)
    assert plan.num_rows == 3
    assert plan.tokens_per_row == 16
    # 11 + 5 and 9 + 4 + 3; in the roomiest row instead of the fullest, 5 would join 9, and 3 would stand alone.
    assert plan_rows(make_shards([12, 10, 6, 5, 4]), 16, keeps=False).num_rows == 2
    rng = np.random.default_rng(0)
    many = make_shards(rng.integers(20, 300, 3000).tolist(), shard_tokens=1 << 20)
    assert plan_rows(many, 512, keeps=False).tokens_per_row > 0.99 * 512


def test_plan_is_kept_and_read_again(make_shards: MakeShards) -> None:
    shards = make_shards([2, 9, 30, 5])
    first = plan_rows(shards, 16)
    folder = next(shards.path.glob("rows-16-*"))
    again = plan_rows(shards, 16)
    assert segments(again) == segments(first)
    # It is read, not made: what is kept is believed as long as it belongs to these shards.
    facts = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(facts | {"num_inputs": 99}))
    assert plan_rows(shards, 16).num_inputs == 99
    (folder / "plan.json").write_text(json.dumps(facts | {"content_hash": "other"}))
    assert plan_rows(shards, 16).num_inputs == first.num_inputs
    (folder / "starts.npy").write_bytes(b"damaged")
    assert segments(plan_rows(shards, 16)) == segments(first)


def test_supervised_rows_are_never_cut_in_two(make_shards: MakeShards) -> None:
    # Targets from token 6 on; a row of 8 inputs sees targets 1…8.
    shards = make_shards([10, 30, 8], supervised_from=6)
    plan = plan_rows(shards, 8, keeps=False)
    assert sorted(length for row in segments(plan) for _, length in row) == [7, 8, 8]
    assert (plan.num_cut, plan.num_dropped) == (2, 0)
    # In a row of 5 the prompt fills everything.
    with pytest.raises(DataError, match="no supervised token is left in rows of 5"):
        plan_rows(shards, 5, keeps=False)


def test_supervised_rows_without_a_target_left_are_dropped_and_counted(make_shards: MakeShards) -> None:
    shards = make_shards([10, 30], supervised_from=8)
    mask = np.memmap(shards.path / shards.manifest["shards"][0]["supervised"], dtype=np.uint8, mode="r+")
    mask[3] = 1
    mask.flush()
    plan = plan_rows(TokenShards.open(shards.path), 5, keeps=False)
    assert (plan.num_rows, plan.num_cut, plan.num_dropped) == (1, 1, 1)
