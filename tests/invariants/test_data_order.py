"""The data order that is worked out from a run's folder is the one that it was trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.tiny_run import go, load, quick_runs

from minicpm.cli.main import run as command
from minicpm.data.batches import Batch
from minicpm.errors import CheckpointError, DataError
from minicpm.train import corpus
from minicpm.train.data_order import FIELDS, open_order


def test_the_order_is_that_of_the_training(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[int, list[Batch]] = {}
    make = corpus.StepBatches.make

    def watched(self: corpus.StepBatches, step: int) -> list[Batch]:
        seen[step] = make(self, step)
        return seen[step]

    monkeypatch.setattr(corpus.StepBatches, "make", watched)
    run = tmp_path / "ordered"
    with quick_runs():
        go(load(home, "schedule.total_steps=12"), run)
    order = open_order(run)
    for step in (1, 4, 5, 12):
        expected = [row.tolist() for part in seen[step] for row in part.input_ids]
        assert order.batch(step).input_ids.tolist() == expected
    # Also where only the history says how the run was made, and for a step that was never saved.
    (run / "run.json").unlink()
    assert (open_order(run).batch(7).input_ids == order.batch(7).input_ids).all()
    order.write(tmp_path / "order.jsonl", 1, 12)
    header, *lines = (json.loads(line) for line in (tmp_path / "order.jsonl").read_text().splitlines())
    assert tuple(header["segment"]) == FIELDS
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["first_row"] for line in lines[:6]] == [0, 2, 4, 6, 8, 12]
    assert [tuple(s) for s in lines[4]["segments"]] == [tuple(r) for r in order.batch(5).references]
    for step, why in ((0, "the start, which no batch made"), (13, "not of this run")):
        with pytest.raises(DataError, match=f"step {step} is {why}; the updates are 1 to 12"):
            order.batch(step)
    assert command(["history", "data", f"{run}@5", "--rows", "1"]) == 0
    assert "── data · document" in capsys.readouterr().out
    assert command(["history", "data", str(run)]) == 2
    assert "names no step" in capsys.readouterr().err
    facts = json.loads((run / "history" / "history.json").read_text())
    del facts["run"]["config"]
    (run / "run.json").write_text(json.dumps(facts["run"]))
    with pytest.raises(CheckpointError, match="does not say in which order its data came"):
        open_order(run)
    shutil.rmtree(run / "tokenizer")
    (run / "run.json").unlink()
    with pytest.raises(DataError, match="tokenizer is gone"):
        open_order(run)
