"""Averages of checkpoints: what a decay of the learning rate would have come to, without training it.

    lawa   the plain mean of a window (latest weight averaging)
    ema    an exponential mean over the window, beta for each checkpoint
    wsm    the mean that stands for a decay of a given shape: with updates g_i between checkpoints and a decay that
           would have scaled them by 1 = w_0 >= w_1 >= … >= w_k >= w_(k+1) = 0, checkpoint j gets w_j - w_(j+1);
           a linear decay is lawa

What this leaves out: measuring what came out (`train.heldout`).

Source: LAWA, arXiv:2209.14981 and 2306.03241; WSM, arXiv:2507.17634, section 3 (theorem 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from minicpm.errors import ConfigError
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry
from minicpm.history.model_folder import write_folder
from minicpm.history.reading import History

Method = Literal["lawa", "ema", "wsm"]
METHODS: tuple[Method, ...] = ("lawa", "ema", "wsm")
Shape = Literal["linear", "sqrt", "exp"]
SHAPES: tuple[Shape, ...] = ("linear", "sqrt", "exp")
# Where an exponential decay ends.
_EXP_END = 0.1


def coefficients(method: Method, count: int, *, beta: float = 0.8, shape: Shape = "sqrt") -> list[float]:
    """Return the share of each checkpoint of a window of `count`, the oldest first; they sum to 1.

    Args:
        method: see above.
        count: at least 2.
        beta: of ema, above 0 and below 1: how much of the mean before stays at each checkpoint.
        shape: of wsm: `linear` falls evenly, `sqrt` as 1 - √, `exp` to a tenth.

    Raises:
        ConfigError: a value out of its range.
    """
    if count < 2:
        raise ConfigError(f"an average takes at least 2 checkpoints, the window holds {count}")
    if not 0 < beta < 1:
        raise ConfigError(f"beta must lie between 0 and 1, got {beta}")
    if method == "lawa":
        return [1 / count] * count
    if method == "ema":
        return [beta ** (count - 1), *((1 - beta) * beta ** (count - 1 - j) for j in range(1, count))]
    scales = [1.0, *(_scale(shape, j / count) for j in range(1, count)), 0.0]
    return [scales[j] - scales[j + 1] for j in range(count)]


def _scale(shape: Shape, share: float) -> float:
    """Return what a decay would have scaled the updates by after `share` of it."""
    if shape == "linear":
        return 1 - share
    return 1 - math.sqrt(share) if shape == "sqrt" else float(_EXP_END**share)


def choose_window(history: History, until: int | None, count: int) -> list[int]:
    """Return the steps of the `count` checkpoints up to `until`; None is the last one of the stable stage.

    Raises:
        CheckpointError: no such step, or no stable stage.
        ConfigError: there are fewer.
    """
    last = history.stage("stable")[-1].step if until is None else history.row(until).step
    steps = [step for step in history.steps if step <= last]
    if not 2 <= count <= len(steps):
        raise ConfigError(f"a window takes 2 to {len(steps)} checkpoints up to step {last}, got {count}")
    return steps[-count:]


def write_average(history: History, steps: Sequence[int], shares: Sequence[float], path: Path) -> None:
    """Make `path` a model folder with the weighted mean of checkpoints, in the dtype of the run; one tensor at a time.

    Raises:
        CheckpointError: `path` exists, the history is damaged, or the disk does not take it.
    """
    entries = {
        name: WeightEntry(entry.shape, entry.block_type, partial(_mean, history, name, steps, shares))
        for name, entry in history[steps[-1]].manifest.tensors.items()
    }
    origin = {"history": history.place.name, "average_of": dict(zip(map(str, steps), shares, strict=True))}
    write_folder(history, entries, origin, path)


def _mean(history: History, name: str, steps: Sequence[int], shares: Sequence[float]) -> Weight:
    weights = (history[step].weight(name) for step in steps)
    total: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | float = 0.0
    block_type = ""
    for weight, share in zip(weights, shares, strict=True):
        total = total + share * weight.decode().astype(np.float64)
        block_type = weight.block_type
    return Weight.from_array(np.asarray(total, np.float32), block_type)
