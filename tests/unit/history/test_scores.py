"""Scores stay with the weights that they are of, go with them, and are drawn setting by setting."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.history.conftest import STEPS, facts_at, weights_at

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.history import History, HistoryWriter
from minicpm.history.place import Folder
from minicpm.history.score_picture import choose_scores, draw_scores
from minicpm.history.scores import SCORES, Score, Setting, add_scores, by_setting, current_scores, read_scores
from minicpm.history.thinning import ThinRule, thin
from minicpm.history.transfer import pull

Make = Callable[..., Path]
SETTING = Setting("piqa", "choice", "plain", 0, 200, "exact", "engine", "", 1, "ab12", "cd34")


def score_of(history: History, step: int, value: float, setting: Setting = SETTING) -> Score:
    row = history.row(step)
    digest = history.manifest(row).weights_sha256
    return Score(step, row.manifest_sha256, digest, setting, {"acc": (value, 0.03), "acc_norm": (value + 0.01, None)})


def test_scores_are_kept_and_replaced(make_history: Make) -> None:
    path = make_history(STEPS[:4])
    history = History(path)
    assert current_scores(history) == []
    folder = Folder(path)
    add_scores(folder, [score_of(history, 100, 0.6)])
    add_scores(folder, [score_of(history, 50, 0.5), score_of(history, 100, 0.7)])
    few = dataclasses.replace(SETTING, num_rows=50)
    add_scores(folder, [score_of(history, 50, 0.4, few)])
    found = current_scores(History(path))
    assert [(s.step, s.value, s.text) for s in found if s.setting == SETTING] == [
        (50, 0.5, "0.5000 ± 0.0300"), (100, 0.7, "0.7000 ± 0.0300")
    ]  # fmt: skip
    assert {label: [s.step for s in scores] for label, scores in by_setting(found).items()} == {
        "piqa acc, n 200": [50, 100], "piqa acc, n 50": [50]
    }  # fmt: skip
    assert found == read_scores(folder)


def test_scores_stay_with_their_weights(make_history: Make, tmp_path: Path, tiny_config: ModelConfig) -> None:
    path = make_history(STEPS[:6])
    history = History(path)
    add_scores(Folder(path), [score_of(history, step, step / 1000) for step in (50, 150)])
    with HistoryWriter(path) as writer:
        thin(writer, ThinRule(steps=(50, 150)))
    thinned = History(path)
    assert thinned.row(150).manifest_sha256 != history.row(150).manifest_sha256
    assert [s.step for s in current_scores(thinned)] == [50, 150]
    with HistoryWriter(path) as writer:
        writer.drop_after(100)
        writer.append(facts_at(150), weights_at(tiny_config, 200))
    assert [s.step for s in current_scores(History(path))] == [50]
    # What is copied takes its scores along, and keeps those that are there.
    copy = tmp_path / "copy"
    pull(History(path), copy, [50])
    add_scores(Folder(copy), [score_of(History(copy), 50, 0.9, dataclasses.replace(SETTING, task="boolq"))])
    pull(History(path), copy, [150])
    assert sorted(by_setting(current_scores(History(copy)))) == ["boolq acc", "piqa acc"]


def _add(path: Path, first: int) -> None:
    history = History(path)
    for shots in range(first, first + 8):
        add_scores(Folder(path), [score_of(history, 50, 0.5, dataclasses.replace(SETTING, shots=shots))])


def test_two_evaluations_at_once_lose_nothing(make_history: Make) -> None:
    path = make_history(STEPS[:3])
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add, args=(path, first)) for first in (0, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(read_scores(Folder(path))) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format="x"), "holds no scores"),
        (lambda v: v.update(format_version=2), "upgrade minicpm"),
        (lambda v: v["scores"][0].pop("task"), "holds no scores: 'task'"),
        (lambda v: v["scores"][0].update(step="5"), "the entry of step '5' is damaged"),
        (lambda v: v["scores"][0].update(figures={}), "is damaged"),
        (lambda v: v["scores"][0]["figures"].update(acc=["x", None]), "is no figure"),
        (lambda v: v.update(scores=3), "holds no scores"),
    ],
)
def test_files_that_lie_are_refused(
    make_history: Make, change: Callable[[dict[str, object]], object], message: str
) -> None:
    path = make_history(STEPS[:3])
    add_scores(Folder(path), [score_of(History(path), 50, 0.5)])
    value = json.loads((path / SCORES).read_text())
    change(value)
    (path / SCORES).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=message):
        current_scores(History(path))


def test_pictures(make_history: Make, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = make_history(STEPS[:4])
    history = History(path)
    add_scores(Folder(path), [score_of(history, step, step / 1000) for step in (0, 50, 100)])
    series = by_setting(current_scores(history))
    draw_scores(history, choose_scores(series, "piqa"), tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    draw_scores(history, choose_scores(series, "all"), tmp_path / "scores.svg")
    assert "piqa acc, ± standard error" in (tmp_path / "scores.svg").read_text()
    with pytest.raises(CheckpointError, match="no checkpoint has a score of 'boolq'; there are piqa"):
        choose_scores(series, "boolq")
    with pytest.raises(CheckpointError, match="has no scores to draw"):
        draw_scores(history, {}, tmp_path / "none.png")
    shutil.rmtree(path / "objects")
    draw_scores(History(path), series, tmp_path / "again.png")
