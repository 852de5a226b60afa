"""A history as a picture for papers: losses, rate and bits a byte with the stages shaded; updates layer by layer.

Drawn from the index, so that a URL will do; the heat maps decode every checkpoint. What this leaves out: comparing
runs.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minicpm.errors import CheckpointError
from minicpm.formats.atomic_file import atomic_file
from minicpm.history.catalogue import Row
from minicpm.history.difference import Difference, by_layer
from minicpm.history.reading import History

Say = Callable[[str], None]

SUFFIXES = (".png", ".svg", ".pdf")
_COLOURS = {"warmup": "#fff3c4", "stable": "#e3f0fb", "decay": "#dff5e1", "tail": "#eeeeee"}
_OTHER_COLOUR = "#f3e8fb"
_NAMED_SHARE = 0.08


def draw(
    history: History, path: Path, *, has_updates: bool = True, say: Callable[[str], None] = lambda _: None
) -> None:
    """Write the picture of `history`, in the format that the suffix of `path` says; whole or not at all.

    Args:
        history: of at least two checkpoints.
        path: ends in .png, .svg or .pdf.
        has_updates: whether each layer's update size and cosine are drawn too.
        say: told which checkpoints are being compared.

    Raises:
        CheckpointError: another suffix, matplotlib is missing, fewer checkpoints, or the disk does not take it.
    """
    figure = new_figure(history, path, 9 if has_updates else 4.5)
    rows = history.rows
    panels = figure.subplots(4 if has_updates else 2, 1, sharex=False)
    _draw_losses(panels[0], rows)
    _draw_rate(panels[1], rows)
    if has_updates:
        changes = compare_neighbours(history, say)
        _draw_map(figure, panels[2], rows, changes, "change", "update: |Δw| / |w|")
        _draw_map(figure, panels[3], rows, changes, "cosine", "cosine to the checkpoint before")
    save_figure(figure, path)


def new_figure(history: History, path: Path, inches: float) -> Any:
    """Return an empty figure of that height for `path`.

    Raises:
        CheckpointError: another suffix, matplotlib is missing, or fewer than two checkpoints.
    """
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} does not say what to draw; its name must end in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise CheckpointError("pictures are drawn by matplotlib, which is not installed: pip install 'minicpm[train]'")
    if len(history) < 2:
        raise CheckpointError(f"{history.place.name} has {len(history)} checkpoints; a picture takes at least 2")
    # The object interface: pyplot would look for a display and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure whole, in the format of its suffix."""
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120)


def compare_neighbours(history: History, say: Say = lambda line: None) -> list[list[Difference]]:
    """Return the differences of every checkpoint to the one before it, layer by layer."""
    found = []
    for before, after in itertools.pairwise(history.rows):
        say(f"step {before.step} to {after.step}")
        a, b = (history.at(row.step, precision=row.precision) for row in (before, after))
        found.append(by_layer(a, b))
    return found


def shade_stages(axes: Any, rows: Sequence[Row]) -> None:
    """Lay the stages behind what is drawn over the steps."""
    begin, span = rows[0].step, rows[-1].step - rows[0].step
    for stage, group in itertools.groupby(rows, key=lambda row: row.stage):
        # A checkpoint's stage is that of its last update, so a stage begins where the one before it ended.
        end = list(group)[-1].step
        axes.axvspan(begin, end, color=_COLOURS.get(stage, _OTHER_COLOUR), lw=0)
        # A narrow one's name would lie over its neighbour's.
        if end - begin >= _NAMED_SHARE * span:
            axes.annotate(
                stage, ((begin + end) / 2, 0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", fontsize=7, color="#666666",
            )  # fmt: skip
        begin = end


def _draw_losses(axes: Any, rows: Sequence[Row]) -> None:
    shade_stages(axes, rows)
    for name, label, style in (("train", "loss", "-"), ("heldout_loss", "held-out loss", "o-")):
        found = points(rows, name)
        if found:
            axes.plot(*zip(*found, strict=True), style, ms=3, lw=1.2, label=label)
    axes.set_ylabel("nats a token")
    _legend(axes)


def _draw_rate(axes: Any, rows: Sequence[Row]) -> None:
    shade_stages(axes, rows)
    bits = points(rows, "heldout_bits_per_byte")
    if bits:
        axes.plot(*zip(*bits, strict=True), "o-", ms=3, lw=1.2, color="#c0392b", label="held-out bits a byte")
    axes.set_ylabel("bits a byte")
    axes.set_xlabel("step")
    rates = axes.twinx()
    rates.plot([row.step for row in rows], [row.lr for row in rows], "--", color="#777777", lw=1)
    rates.set_ylabel("learning rate (dashed)")
    _legend(axes)


def points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a measurement, each once."""
    # What was measured on held-out text is repeated until it is measured again, with the step that it is of.
    step = "" if name == "train" else "heldout_step"
    return sorted({(int(row.losses.get(step, row.step)), row.losses[name]) for row in rows if name in row.losses})


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", fontsize=8)


def _draw_map(
    figure: Any, axes: Any, rows: Sequence[Row], changes: Sequence[Sequence[Difference]], value: str, title: str
) -> None:
    names = [difference.name for difference in changes[0]]
    values = np.array([[getattr(d, value) for d in found] for found in changes], dtype=np.float64).T
    mesh = axes.pcolormesh(np.arange(len(changes) + 1), np.arange(len(names) + 1), values, cmap="viridis")
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7)
    shown = np.unique(np.linspace(0, len(changes) - 1, min(len(changes), 12)).astype(int))
    axes.set_xticks(shown + 0.5, [str(rows[i + 1].step) for i in shown], fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step")
    figure.colorbar(mesh, ax=axes)
