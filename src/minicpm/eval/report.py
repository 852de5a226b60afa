"""A page of one run, in English and Chinese, that opens without a network: figures, bars, protocol, a few samples."""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from minicpm.data.atomic import new_file
from minicpm.eval.results import Scoring, read_samples
from minicpm.eval.statistics import Figure

_NUM_SAMPLES = 5
_MAX_SAMPLE_CHARACTERS = 4000
_WORDS = {"model": "模型", "runtime": "运行方式", "protocol": "评测协议"}
_UNBOUNDED = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


def describe(figure: Figure) -> str:
    """Return "0.4312 ± 0.0140": a value and its standard error."""
    if math.isnan(figure.stderr):
        return f"{figure.value:.4f}"
    return f"{figure.value:.4f} ± {figure.stderr:.4f}"


def spread(scorings: Sequence[Scoring]) -> list[tuple[str, str, float, float]]:
    """Return (task, metric, lowest, highest) over the phrasings of each task that has several of one mode and size."""
    groups: dict[tuple[str, str, str, int], list[float]] = {}
    for scoring in scorings:
        key = scoring.task, scoring.mode, scoring.metric, scoring.num_rows
        groups.setdefault(key, []).append(scoring.figures[0].value)
    return [(task, metric, min(v), max(v)) for (task, _, metric, _), v in groups.items() if len(v) > 1]


def write_report(folder: Path, facts: dict[str, Any], protocol: str, scorings: Sequence[Scoring]) -> Path:
    """Write `report.html` into the folder of a run and return its path."""
    source = importlib.resources.files("minicpm.eval").joinpath("report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    text = page.render(
        model=facts.get("model", ""),
        facts={**facts, "protocol": protocol},
        scorings=scorings,
        sources=dict.fromkeys((scoring.task, scoring.origin, scoring.sha256) for scoring in scorings),
        spreads=spread(scorings),
        samples=[(scoring, _samples(folder, scoring)) for scoring in scorings],
        words=_WORDS,
        describe=describe,
        share=_share,
    )
    path = folder / "report.html"
    with new_file(path) as file:
        file.write(text.encode())
    return path


def _share(figure: Figure) -> tuple[float, float] | None:
    """The value and its error as shares of the best possible one, in percent; None where there is none."""
    if figure.metric in _UNBOUNDED:
        return None
    best = 10 if figure.metric.startswith("score") else 1
    error = 0.0 if math.isnan(figure.stderr) else figure.stderr
    return 100 * figure.value / best, 100 * error / best


def _samples(folder: Path, scoring: Scoring) -> list[tuple[str, list[tuple[str, str]]]]:
    """(what the first rows scored, [what was kept of them by name])."""
    return [
        (
            ", ".join(f"{name} {_text(value)}" for name, value in sample.values.items()),
            [(name, _text(value)[:_MAX_SAMPLE_CHARACTERS]) for name, value in sample.detail.items()],
        )
        for sample in read_samples(folder, scoring.task, scoring.form)[:_NUM_SAMPLES]
    ]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
