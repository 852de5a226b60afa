"""Pictures are written whole in the format that was asked for, and show what the index says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.history.conftest import STEPS

from minicpm.errors import CheckpointError
from minicpm.history import History
from minicpm.history.catalogue import Row
from minicpm.history.picture import compare_neighbours, draw, points

Make = Callable[..., Path]


def test_pictures(make_history: Make, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = History(make_history(STEPS[:5]))
    draw(history, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    draw(history, tmp_path / "run.svg", has_updates=False)
    assert "<svg" in (tmp_path / "run.svg").read_text()[:600]
    changes = compare_neighbours(history)
    assert [len(found) for found in changes] == [8] * 4  # embedding, five layers, norm, all
    # Step 0 to 1 hardly moves, 50 to 100 by a third of a weight's size.
    assert changes[0][-1].change < 0.01 < 0.2 < changes[2][-1].change < 0.5
    with pytest.raises(CheckpointError, match=r"run.gif does not say what to draw; its name must end in .png, .svg"):
        draw(history, tmp_path / "run.gif")
    with pytest.raises(CheckpointError, match="has 1 checkpoints; a picture takes at least 2"):
        draw(History(make_history((0,), "one")), tmp_path / "one.png")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["run.png", "run.svg"]


def test_a_measurement_is_drawn_where_it_was_made() -> None:
    losses = [{"train": 5.0}, {"train": 4.0, "heldout_loss": 6.0, "heldout_step": 90.0}]
    losses += [{"train": 4.0, "heldout_loss": 6.0, "heldout_step": 90.0}]
    rows = [Row(50 * i, 0, "stable", 0.1, found, 1, False, "0" * 64) for i, found in enumerate(losses, 1)]
    assert points(rows, "train") == [(50, 5.0), (100, 4.0), (150, 4.0)]
    assert points(rows, "heldout_loss") == [(90, 6.0)]
