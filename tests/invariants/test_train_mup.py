"""Coordinate check: with muP groups, activations do not know how wide the model is."""

from __future__ import annotations

from pathlib import Path

import pytest

from minicpm.train.coordinates import coordinate_check, plot_coordinates, slope

WIDTHS = (128, 256, 512, 1024)


@pytest.mark.slow
def test_activations_are_flat_over_widths(tmp_path: Path) -> None:
    found = coordinate_check(WIDTHS)
    without = coordinate_check(WIDTHS[:3], steps=2, is_mup=False)
    for step in range(1, 5):
        for part in ("layer 0", "layer 1"):
            # Measured 0.013 at most; 1.4 and more with one rate and one start for all widths.
            assert abs(slope(found[part], step)) < 0.05
        # The first logits' distance shrinks with the random part of the head, and must not grow.
        assert -0.5 < slope(found["logits moved"], step) < 0.05
    for part in ("layer 0", "layer 1", "logits moved"):
        assert slope(without[part], 2) > 0.5
    picture = tmp_path / "check.png"
    plot_coordinates({"muP": found, "one rate": without}, picture)
    assert picture.stat().st_size > 10_000
