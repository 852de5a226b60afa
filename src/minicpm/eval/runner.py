"""Tasks on a model: every form of each task, batch by batch, each batch on disk before the next.

What this leaves out: how a model is opened and what is drawn while it runs (`cli/eval.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicpm.errors import EvalError
from minicpm.eval import code, dialogue
from minicpm.eval.contract import EvaluatedModel
from minicpm.eval.forms import FormReader, Question, digest
from minicpm.eval.judge import Sample, Sampling, figures, judge
from minicpm.eval.results import RESULTS, SampleFile, Scoring, read_results, sample_path, write_results
from minicpm.eval.rows import Rows, read_task
from minicpm.eval.task import Form, Task, load_task

# The card's evaluation samples: arXiv:2404.06395 with OpenBMB/UltraEval's settings for generation.
SAMPLINGS = {"plain": Sampling(), "ultraeval": Sampling(temperature=0.3, top_p=0.8, seed=0, max_new_tokens=300)}


@dataclass(frozen=True)
class Progress:
    """How far one scoring is; `rows_per_second` counts the rows of this run alone."""

    task: str
    form: str
    num_done: int
    num_rows: int
    rows_per_second: float


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        tasks: names or paths.
        protocol: "plain" or "ultraeval".
        data: the folder of rows; None is the hub.
        out: the folder of samples and results.
        limit: rows of each task; None is all.
        shots: examples in front, in the place of each form's own number.
        batch_rows: rows between two writes to disk, where they are not whole texts.
        with_paraphrases: whether forms that say the same in other words run too.
        allows_code: whether programs that the model writes are run.
        judge: who judges dialogues.
        report: told how far it is.
        on_scoring: told each result, when it is on the disk.
    """

    tasks: Sequence[str]
    out: Path
    protocol: str = "plain"
    data: Path | None = None
    limit: int | None = None
    shots: int | None = None
    batch_rows: int = 64
    with_paraphrases: bool = False
    allows_code: bool = False
    judge: dialogue.Judge | None = None
    report: Callable[[Progress], None] = field(default=lambda progress: None)
    on_scoring: Callable[[Scoring], None] = field(default=lambda scoring: None)


@dataclass(frozen=True)
class Job:
    """One form of one task, with its questions in the order of the rows."""

    name: str
    task: Task
    form: Form
    rows: Rows
    questions: list[Question]


def prepare(plan: Plan) -> list[Job]:
    """Return everything that `plan` asks, row by row; what can be wrong without a model is found here.

    Raises:
        ConfigError: an unknown task, or a wrong task file.
        DataError: rows that are damaged, or do not fit the task.
        EvalError: rows that are not there; a task that has no form in the protocol, or needs what is not allowed.
    """
    tasks = [(name, load_task(name)) for name in dict.fromkeys(plan.tasks)]
    for name, task in tasks:
        _check(plan, name, task)
    if any(task.needs_code for _, task in tasks):
        code.require_jail()
    return [job for name, task in tasks for job in _jobs(plan, name, task)]


def _check(plan: Plan, name: str, task: Task) -> None:
    forms = task.forms(plan.protocol)
    if not forms:
        raise EvalError(f"task {name} has no form in protocol {plan.protocol}; leave it out")
    if task.needs_code and not plan.allows_code:
        raise EvalError(f"task {name} runs programs that the model writes, in a sandbox; allow it by --allow-code")
    if any(form.mode == "dialogue" for form in forms) and plan.judge is None:
        raise EvalError(f"task {name} is judged by another model; name its server by --judge URL")


def _jobs(plan: Plan, name: str, task: Task) -> Iterator[Job]:
    rows = read_task(name, task, plan.data)
    chosen = rows.rows if plan.limit is None else rows.rows[: plan.limit]
    for form in task.forms(plan.protocol, with_paraphrases=plan.with_paraphrases):
        form = form.with_shots(plan.shots)
        yield Job(name, task, form, rows, FormReader(form, f"{name} ({form.name})").questions(chosen, rows.examples))


def run(plan: Plan, jobs: Sequence[Job], model: EvaluatedModel, facts: dict[str, Any]) -> list[Scoring]:
    """Put `jobs` to `model`, continuing what an earlier run left in `plan.out`, and write results beside its.

    Args:
        plan: what to do.
        jobs: of the same plan, prepared.
        model: on what.
        facts: what identifies the model in the results and in sample files: anything that changes its scores.

    Raises:
        EvalError: the folder holds another run, or a judge fails; what was scored so far is kept.
    """
    earlier = _earlier(plan, facts, {(job.name, job.form.name) for job in jobs})
    scorings: list[Scoring] = []
    for job in jobs:
        scorings.append(_run_job(plan, model, facts, job))
        write_results(plan.out, facts, plan.protocol, [*earlier, *scorings])
        plan.on_scoring(scorings[-1])
    return scorings


def _earlier(plan: Plan, facts: dict[str, Any], asked: Collection[tuple[str, str]]) -> list[Scoring]:
    """What the folder holds of the same model and protocol, besides what is asked now."""
    if not (plan.out / RESULTS).exists():
        return []
    header, scorings = read_results(plan.out)
    is_same = header.get("model") == facts and header.get("protocol") == plan.protocol
    return [s for s in scorings if (s.task, s.form) not in asked] if is_same else []


def _run_job(plan: Plan, model: EvaluatedModel, facts: dict[str, Any], job: Job) -> Scoring:
    form, total = job.form, len(job.questions)
    sampling = SAMPLINGS[plan.protocol]
    header = {
        "model": facts, "task": job.name, "version": job.task.version, "form": form.name, "form_digest": digest(form),
        "shots": form.shots, "protocol": plan.protocol, "sha256": job.rows.sha256,
        "judge": plan.judge.name if form.mode == "dialogue" and plan.judge else None,
    }  # fmt: skip
    file = SampleFile(sample_path(plan.out, job.name, form.name), header)
    left = [index for index in range(total) if index not in file.done]
    start, num_new = time.monotonic(), 0

    def told() -> None:
        rate = num_new / max(time.monotonic() - start, 1e-9)
        plan.report(Progress(job.name, form.name, total - len(left) + num_new, total, rate))

    told()
    # A whole text is long, and scored alone.
    for batch in _batches(left, 1 if form.mode == "perplexity" else plan.batch_rows):
        questions = {index: job.questions[index] for index in batch}
        if form.mode == "dialogue":
            assert plan.judge is not None, "checked before"
            samples: Iterable[Sample] = dialogue.judge_dialogues(model, plan.judge, questions, sampling, form)
        else:
            samples = judge(form, model, questions, sampling)
        for sample in samples:
            file.append([sample])
            num_new += 1
        told()
    wanted = [file.done[index] for index in range(total)]
    return Scoring(
        task=job.name, version=job.task.version, form=form.name, form_digest=digest(form), metric=form.known_by,
        shots=form.shots, mode=form.mode, origin=job.rows.origin, sha256=job.rows.sha256, num_rows=total,
        figures=tuple(figures(form, wanted)),
    )  # fmt: skip


def _batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
