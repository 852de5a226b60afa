"""Two runs side by side, row by row: what changed, and whether chance alone would change as much."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minicpm.errors import EvalError
from minicpm.eval import statistics
from minicpm.eval.results import Scoring, read_results, read_samples
from minicpm.eval.statistics import Difference, Figure


@dataclass(frozen=True)
class Change:
    """One scoring in both runs, by the metric that it is known by (a perplexity by its rows' log-probabilities)."""

    task: str
    form: str
    a: Figure
    b: Figure
    difference: Difference


def compare_runs(a: Path, b: Path) -> list[Change]:
    """Return the change from run `a` to run `b` of every scoring that both have, paired by rows.

    Raises:
        EvalError: they share no scoring, or a shared one has other data, another version or form.
    """
    _, left = read_results(a)
    _, right = read_results(b)
    others = {(s.task, s.form): s for s in right}
    changes = []
    for scoring in left:
        other = others.get((scoring.task, scoring.form))
        if other is not None:
            changes.append(_change(a, b, scoring, other))
    if not changes:
        raise EvalError(f"{a} and {b} share no task; {a} has {_names(left)}, {b} has {_names(right)}")
    return changes


def _change(a: Path, b: Path, x: Scoring, y: Scoring) -> Change:
    for name in ("version", "form_digest", "sha256"):
        if getattr(x, name) != getattr(y, name):
            raise EvalError(f"{x.task} ({x.form}) differs in {name} between {a} and {b}: their rows cannot be paired")
    first = {sample.index: sample for sample in read_samples(a, x.task, x.form)}
    second = {sample.index: sample for sample in read_samples(b, y.task, y.form)}
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise EvalError(f"{a} and {b} share no row of {x.task} ({x.form})")
    key = x.metric if x.metric in first[shared[0]].values else "logprob"
    difference = statistics.compare(
        key, [first[i].values[key] for i in shared], [second[i].values[key] for i in shared]
    )
    return Change(x.task, x.form, x.figures[0], y.figures[0], difference)


def _names(scorings: list[Scoring]) -> str:
    return ", ".join(sorted({scoring.task for scoring in scorings})) or "none"
