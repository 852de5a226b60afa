"""Averages by hand: shares that sum to 1, and the equality that defines each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.unit.history.conftest import STEPS, weights_at

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, ConfigError
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.history import History
from minicpm.history.averaging import METHODS, SHAPES, choose_window, coefficients, write_average

NAME = "model.layers.3.mlp.up_proj.weight"


def test_shares_sum_to_one_and_are_what_they_say() -> None:
    for method in METHODS:
        for shape in SHAPES:
            assert sum(coefficients(method, 7, shape=shape)) == pytest.approx(1)
    assert coefficients("lawa", 4) == [0.25] * 4
    assert coefficients("ema", 3, beta=0.5) == [0.25, 0.25, 0.5]
    assert coefficients("wsm", 5, shape="linear") == pytest.approx(coefficients("lawa", 5))
    # 1 - √(j/4): 1, 0.5, 0.2929, 0.1340, 0
    assert coefficients("wsm", 4) == pytest.approx([0.5, 0.2071, 0.1589, 0.1340], abs=1e-4)
    for arguments, message in (
        (("lawa", 1), "at least 2 checkpoints"),
        (("ema", 3, 1.0), "beta must lie between 0 and 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            coefficients(*arguments[:2], beta=(*arguments, 0.8)[2])


def test_wsm_is_the_decay_that_it_stands_for() -> None:
    start, updates = 3.0, np.array([0.5, -1.0, 2.0, 0.25])
    checkpoints = start + np.cumsum([0.0, *updates])
    scales = 1 - np.sqrt(np.arange(1, 5) / 5)
    merged = np.dot(coefficients("wsm", 5), checkpoints)
    assert merged == pytest.approx(start + np.dot(scales, updates))


def test_a_window_becomes_a_model_folder(
    make_history: Callable[..., Path], tmp_path: Path, tiny_config: ModelConfig
) -> None:
    history = History(make_history(STEPS[:6]))
    steps = choose_window(history, None, 3)
    assert steps == [100, 150, 200]
    assert choose_window(history, 150, 2) == [100, 150]
    write_average(history, steps, [0.5, 0.3, 0.2], tmp_path / "mean")
    found = open_checkpoint(tmp_path / "mean").weights[NAME]
    parts = [weights_at(tiny_config, step)[NAME].decode() for step in steps]
    expected = 0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2]
    assert found.block_type == "BF16"
    assert np.abs(found.decode() - expected).max() <= np.abs(expected).max() / 256
    with pytest.raises(ConfigError, match="a window takes 2 to 6 checkpoints up to step 200, got 7"):
        choose_window(history, None, 7)
    with pytest.raises(CheckpointError, match="exists already"):
        write_average(history, steps, [0.5, 0.3, 0.2], tmp_path / "mean")
