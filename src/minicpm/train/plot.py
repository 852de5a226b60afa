"""`loss.png`: loss, held-out bits per byte and learning rate over the steps, the stages shaded.

Drawn from `metrics.jsonl`, so it can be drawn again at any time. What this leaves out: comparing runs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from minicpm.formats.atomic_file import atomic_file
from minicpm.train.log import read_metrics
from minicpm.train.schedule import ScheduleConfig, stage_bounds

PICTURE = "loss.png"
_COLOURS = {"warmup": "#fff3c4", "stable": "#e3f0fb", "decay": "#dff5e1", "tail": "#eeeeee"}


def plot_loss(run: Path, schedule: ScheduleConfig) -> Path | None:
    """Write the picture and return its path; None where matplotlib is missing or nothing was recorded.

    Raises:
        CheckpointError: the disk does not take it.
    """
    rows = read_metrics(run)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    if not losses or importlib.util.find_spec("matplotlib") is None:
        return None
    # The object interface: pyplot would look for a display and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Stages and rate lie behind the losses and their legend.
    rates = axes.twinx()
    axes.set_zorder(rates.get_zorder() + 1)
    axes.patch.set_visible(False)
    last = losses[-1][0]
    for name, first, end in stage_bounds(schedule):
        if first <= last:
            rates.axvspan(first, min(end + 1, last), color=_COLOURS[name], lw=0, label=name)
    rates.plot(*zip(*((r["step"], r["lr"]) for r in rows if "lr" in r), strict=True), color="#999999", lw=1, ls="--")
    rates.set_ylabel("learning rate (dashed)")
    axes.plot(*zip(*losses, strict=True), color="#9db8d2", lw=0.8, label="loss")
    axes.plot(*zip(*smooth(losses), strict=True), color="#1f5fa8", lw=1.6, label="loss, smoothed")
    _plot_heldout(axes, rows)
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    handles = [h for side in (rates, axes) for h in side.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper right", fontsize=8)
    with atomic_file(run / PICTURE) as file:
        figure.savefig(file, format="png", dpi=120)
    return run / PICTURE


def _plot_heldout(axes: Any, rows: list[dict[str, Any]]) -> None:
    points = [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]
    if points:
        axes.plot(*zip(*points, strict=True), "o-", color="#c0392b", ms=3, lw=1, label="held-out loss")


def smooth(points: list[tuple[int, float]], keep: float = 0.95) -> list[tuple[int, float]]:
    """Return the points with an exponential mean that looks back over a fifth of the points at first.

    Losses fall steeply there, and a mean of fixed length would lag far above them.
    """
    mean, smoothed = 0.0, []
    for number, (step, value) in enumerate(points):
        mean += max(1 - keep, 1 / (1 + number / 5)) * (value - mean)
        smoothed.append((step, mean))
    return smoothed
