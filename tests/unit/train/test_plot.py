"""The smoothed curve stays with a steep fall, and rests where losses rest."""

from __future__ import annotations

import pytest

from minicpm.train.plot import smooth


def test_smoothing_follows_the_first_fall_and_then_averages() -> None:
    falling = [(step, 10.0 / step) for step in range(1, 21)]
    assert dict(smooth(falling))[20] == pytest.approx(0.5, abs=0.35)
    noisy = [(step, 4.0 + (-1) ** step) for step in range(1, 401)]
    assert all(abs(value - 4.0) < 0.06 for _, value in smooth(noisy)[-50:])
