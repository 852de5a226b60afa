"""Both models on a few tasks, paired row by row: whether rounding cost answers, beside what it cost in nats.

Where no task's rows are at hand a task is made of the held-out text: which of four continuations is a row's own. What
this leaves out: the tasks and how they are scored (`minicpm.eval`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minicpm.engine.opening import open_language_model
from minicpm.errors import EvalError
from minicpm.eval.compare import Change, compare_runs
from minicpm.eval.engine_model import EngineModel
from minicpm.eval.rows import read_task
from minicpm.eval.runner import Plan, prepare, run
from minicpm.eval.task import load_task

# Scored by likelihood, so that a few dozen rows take seconds.
SMALL_TASKS = ("arc_easy", "piqa", "winogrande", "lambada")
CONTINUATION = "continuation"
NUM_CHOICES = 4
# At most, and of a text at least.
_CONTEXT_CHARACTERS, _CHOICE_CHARACTERS, _LEAST_CHARACTERS = 240, 80, 80
_FORM = f"""version = 1
source = "the held-out text of a quantization: which continuation is the row's own"
file = "{CONTINUATION}.jsonl"

[[form]]
name = "choice"
mode = "choice"
metric = "acc"
protocols = ["plain"]
context = "{{{{ context }}}}"
choices = "choices"
gold = "gold"
"""


def tasks_at_hand(data: Path | None) -> list[str]:
    """Return those of `SMALL_TASKS` whose rows the folder `data` holds."""
    found = []
    for name in SMALL_TASKS if data is not None else ():
        try:
            read_task(name, load_task(name), data)
        except EvalError:
            continue
        found.append(name)
    return found


def check_tasks(tasks: Sequence[str], data: Path | None, limit: int) -> None:
    """Return if `tasks` can be run, so that what is wrong shows before hours of rounding.

    Raises:
        MiniCPMError: they cannot.
    """
    if tasks:
        prepare(Plan(tasks=tasks, out=Path(), data=data, limit=limit))


def continuation_rows(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows with `context`, `choices` (a text's own continuation among those of three others) and `gold`."""
    halves = [half for half in map(_cut, texts) if half]
    if len(halves) < NUM_CHOICES:
        return []
    rows = []
    for index, (context, own) in enumerate(halves):
        choices = [halves[(index + offset) % len(halves)][1] for offset in range(1, NUM_CHOICES)]
        gold = index % NUM_CHOICES
        choices.insert(gold, own)
        # Of one length, so that no shorter one is likelier for that alone.
        length = min(map(len, choices))
        rows.append({"context": context, "choices": [choice[:length] for choice in choices], "gold": gold})
    return rows


def _cut(text: str) -> tuple[str, str] | None:
    """Return the beginning of a text and what follows, cut at a space where there is one; None of a short text."""
    text = " ".join(text.split())
    if len(text) < _LEAST_CHARACTERS:
        return None
    at = min(_CONTEXT_CHARACTERS, len(text) * 3 // 4)
    space = text.rfind(" ", at // 2, at)
    at = space if space >= 0 else at
    return text[:at].strip(), text[at:].strip()[:_CHOICE_CHARACTERS]


def compare_on_tasks(
    original: Path, quantized: Path, tasks: Sequence[str], data: Path | None, texts: Sequence[str], limit: int
) -> list[Change]:
    """Return how the model at `quantized` differs from that at `original` on each task, paired by rows.

    Args:
        original: a file or folder; one model is in memory at a time.
        quantized: the other.
        tasks: names or paths; none is those of `SMALL_TASKS` that `data` has, or else the continuations of `texts`.
        data: the folder of the tasks' rows; None is the hub.
        texts: held-out rows.
        limit: rows of each task.

    Returns:
        A change for each form of each task; nothing where `texts` are too few or too short to make one.

    Raises:
        MiniCPMError: a task or its rows are wrong.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = list(tasks) or tasks_at_hand(data)
        if not chosen:
            rows = continuation_rows(texts)
            if not rows:
                return []
            (folder / f"{CONTINUATION}.toml").write_text(_FORM, encoding="utf-8")
            (folder / f"{CONTINUATION}.jsonl").write_text("".join(map(_line, rows)), encoding="utf-8")
            chosen, data = [str(folder / f"{CONTINUATION}.toml")], folder
        for side, path in (("original", original), ("quantized", quantized)):
            plan = Plan(tasks=chosen, out=folder / side, data=data, limit=limit)
            # The jobs first: what is wrong with them shows before a model is opened.
            jobs = prepare(plan)
            with open_language_model(path) as model:
                scored = EngineModel(side, model)
                run(plan, jobs, scored, {"model": side, "runtime": scored.runtime})
        return compare_runs(folder / "original", folder / "quantized")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
