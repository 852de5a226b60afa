"""Scores of a history's checkpoints as a picture: each against the step, with its standard error, the stages shaded.

What this leaves out: curves of the training itself (`picture`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minicpm.errors import CheckpointError
from minicpm.history.picture import new_figure, save_figure, shade_stages
from minicpm.history.reading import History
from minicpm.history.scores import Score

_PANEL_INCHES = 2.3


def choose_scores(series: Mapping[str, Sequence[Score]], text: str) -> dict[str, Sequence[Score]]:
    """Return the series of the tasks that `text` names, with commas between; "all" is all.

    Raises:
        CheckpointError: there is none of such a task; with those that are there.
    """
    names = {scores[0].setting.task for scores in series.values()}
    asked = sorted(names) if text == "all" else [name for name in text.split(",") if name]
    if unknown := [name for name in asked if name not in names]:
        raise CheckpointError(
            f"no checkpoint has a score of {unknown[0]!r}; there are {', '.join(sorted(names)) or 'none'}: "
            "`minicpm history eval` adds them"
        )
    return {label: scores for label, scores in series.items() if scores[0].setting.task in asked}


def draw_scores(history: History, series: Mapping[str, Sequence[Score]], path: Path) -> None:
    """Write the picture of `series`, in the format that the suffix of `path` says; whole or not at all.

    Raises:
        CheckpointError: another suffix, matplotlib is missing, nothing to draw, or the disk does not take it.
    """
    if not series:
        raise CheckpointError(f"{history.place.name} has no scores to draw: `minicpm history eval` adds them")
    figure = new_figure(history, path, max(3.0, _PANEL_INCHES * len(series)))
    panels = figure.subplots(len(series), 1, squeeze=False)[:, 0]
    for axes, (label, scores) in zip(panels, series.items(), strict=True):
        _draw(axes, history, label, scores)
    panels[-1].set_xlabel("step")
    save_figure(figure, path)


def _draw(axes: Any, history: History, label: str, scores: Sequence[Score]) -> None:
    shade_stages(axes, history.rows)
    steps = [score.step for score in scores]
    errors = [score.stderr or math.nan for score in scores]
    axes.errorbar(steps, [score.value for score in scores], yerr=errors, fmt="o-", ms=3, lw=1.2, capsize=2)
    axes.set_title(f"{label}, ± standard error", fontsize=9)
