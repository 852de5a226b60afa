"""Tasks beside a quantization: those whose rows are at hand, or one made of held-out text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minicpm.exchange.task_table import compare_on_tasks, continuation_rows, tasks_at_hand

TEXTS = [f"{name} " * 80 + f"{name}s end." for name in ("badger", "lighthouse", "tofu", "window", "keeper")]


def test_each_continuation_stands_among_three_others() -> None:
    rows = continuation_rows([*TEXTS, "too short"])
    assert len(rows) == 5
    for row, text in zip(rows, TEXTS, strict=True):
        assert len(set(row["choices"])) == len(row["choices"]) == 4
        assert len({len(choice) for choice in row["choices"]}) == 1
        assert text.startswith(f"{row['context']} {row['choices'][row['gold']]}")
    assert {row["gold"] for row in rows} == {0, 1, 2, 3}
    assert continuation_rows(TEXTS[:3]) == []


def test_chinese_has_no_spaces_to_cut_at() -> None:
    rows = continuation_rows([character * 400 for character in "清晨的集"])
    assert [len(row["context"]) for row in rows] == [240] * 4
    assert all(len(choice) == 80 for row in rows for choice in row["choices"])


@pytest.mark.slow
def test_published_tasks_where_their_rows_are_and_own_text_elsewhere(smollm2_path: Path, tmp_path: Path) -> None:
    rows = [{"goal": f"Open box {n}", "sol1": "lift the lid.", "sol2": "eat the moon.", "label": 0} for n in range(9)]
    (tmp_path / "piqa_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tasks_at_hand(tmp_path) == ["piqa"]
    assert tasks_at_hand(None) == []
    (change,) = compare_on_tasks(smollm2_path, smollm2_path, [], tmp_path, [], 6)
    assert (change.task, change.difference.num_rows, change.difference.difference) == ("piqa", 6, 0)
    assert change.a.value == 1
    (change,) = compare_on_tasks(smollm2_path, smollm2_path, [], None, TEXTS, 4)
    assert Path(change.task).stem == "continuation"
    assert change.a.value == change.b.value >= 0.75
    assert compare_on_tasks(smollm2_path, smollm2_path, [], None, TEXTS[:2], 4) == []
