"""`minicpm history eval`: scores of checkpoints, kept beside the history, drawn against the step."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.evaluating import Drawer, add_evaluation, check_evaluation, make_plan
from minicpm.cli.history_writing import add_steps, choose_steps, run_name
from minicpm.cli.parser import Parser, UsageError
from minicpm.cli.terminal import note, out, suggest, table
from minicpm.errors import CheckpointError

if TYPE_CHECKING:
    from minicpm.eval.results import Scoring
    from minicpm.eval.runner import Job
    from minicpm.history.place import Folder
    from minicpm.history.reading import History, Snapshot
    from minicpm.history.scores import Score, Setting


def eval_parser() -> Parser:
    """Return the parser of `eval`."""
    verb = Parser(
        "history eval",
        "Score checkpoints on published tasks, as `minicpm eval` scores a model, and draw the scores against the step. "
        "They are kept beside the history: what was scored already is not scored again, and a run that was interrupted "
        "goes on where it stopped.",
        [
            "minicpm history eval runs/nano --tasks arc_easy,lambada --data DIR --limit 200",
            "minicpm history eval runs/nano --tasks piqa --data DIR --steps 0:10000:500",
            "minicpm history eval runs/nano --tasks piqa --data DIR --steps decay --precision base",
        ],
    )
    verb.add_argument("source", metavar="RUN", help="a run's folder, or a history's folder")
    add_steps(verb, "all")
    verb.add_argument("--every", type=int, metavar="N", help="of these only multiples of N, and the last one")
    verb.add_argument("--precision", choices=("exact", "base"), default="exact", help="(default: exact)")
    add_evaluation(verb)
    verb.add_argument("--out", type=Path, metavar="DIR", help="samples and the picture (default: eval/RUN)")
    return verb


def evaluate(options: argparse.Namespace) -> None:
    """Score, keep, draw."""
    from minicpm.eval.runner import prepare
    from minicpm.history.naming import open_history

    if not options.tasks:
        raise UsageError("name --tasks NAME,… (`minicpm eval --list` shows them)")
    check_evaluation(options)
    history = open_history(options.source)
    folder = _own_folder(history)
    steps = _steps(options, history)
    work = options.out or Path("eval") / run_name(options.source)
    jobs = prepare(make_plan(options, work, lambda progress: None))
    for number, step in enumerate(steps, 1):
        snapshot = history.at(step, precision=options.precision)
        missing = _missing(options, snapshot, jobs, folder)
        done = "" if missing else ": scored already"
        note(f"step {step}, {number} of {len(steps)}{done}")
        if missing:
            _score(options, snapshot, missing, folder, work)
    history.refresh()
    _show(options, history, steps, jobs, work)


def _own_folder(history: History) -> Folder:
    from minicpm.history.place import Folder

    if not isinstance(history.place, Folder):
        raise CheckpointError(
            f"scores are kept beside a history, and {history.place.name} cannot be written; copy it first: minicpm "
            f"history pull {history.place.name} DIR"
        )
    return history.place


def _steps(options: argparse.Namespace, history: History) -> list[int]:
    steps = choose_steps(history, options.steps)
    if options.every is None:
        return steps
    if options.every < 1:
        raise UsageError(f"--every must be at least 1, got {options.every}")
    return [step for step in steps if step % options.every == 0 or step == steps[-1]]


def _missing(options: argparse.Namespace, snapshot: Snapshot, jobs: list[Job], folder: Folder) -> list[Job]:
    """The jobs whose score is not there yet."""
    from minicpm.history.scores import read_scores

    digest = snapshot.manifest.weights_sha256
    known = {score.is_of for score in read_scores(folder)}
    return [job for job in jobs if (digest, _setting(options, job)) not in known]


def _setting(options: argparse.Namespace, job: Job) -> Setting:
    from minicpm.eval.forms import digest
    from minicpm.history.scores import Setting

    words = [f"{name} {value}" for name, value in (("kv", options.kv_type), ("ctx", options.ctx)) if value is not None]
    is_judged = job.form.mode == "dialogue"
    return Setting(
        task=job.name, form=job.form.name, protocol=options.protocol, shots=job.form.shots,
        num_rows=len(job.questions), precision=options.precision, runtime=", ".join(["engine", *words]),
        judge=f"{options.judge} {options.judge_model or ''}".strip() if is_judged else "",
        version=job.task.version, form_digest=digest(job.form), data_sha256=job.rows.sha256,
    )  # fmt: skip


def _score(options: argparse.Namespace, snapshot: Snapshot, jobs: list[Job], folder: Folder, work: Path) -> None:
    """Put `jobs` to one checkpoint; each score is kept as soon as it is known."""
    import minicpm
    from minicpm.eval.engine_model import EngineModel
    from minicpm.eval.runner import run
    from minicpm.history.scores import Score, add_scores

    settings = {(job.name, job.form.name): _setting(options, job) for job in jobs}
    digest = snapshot.manifest.weights_sha256

    def keep(scoring: Scoring) -> None:
        figures = {f.metric: (f.value, None if f.stderr != f.stderr else f.stderr) for f in scoring.figures}
        setting = settings[scoring.task, scoring.form]
        add_scores(folder, [Score(snapshot.step, snapshot.row.manifest_sha256, digest, setting, figures)])

    name = f"{snapshot.step}:base" if options.precision == "base" else str(snapshot.step)
    drawer = Drawer()
    with minicpm.load(
        f"{options.source}@{name}",
        context_length=options.ctx, num_threads=options.threads, kv_type=options.kv_type,
    ) as language_model:  # fmt: skip
        model = EngineModel(f"{run_name(options.source)}@{name}", language_model)
        facts = {"model": model.name, "runtime": model.runtime, "kv_type": options.kv_type, "weights_sha256": digest}
        plan = make_plan(options, work / f"step-{name.replace(':', '-')}", drawer.draw, keep)
        try:
            run(plan, jobs, model, facts)
        finally:
            drawer.end()


def _show(options: argparse.Namespace, history: History, steps: list[int], jobs: list[Job], work: Path) -> None:
    """Print the scores of these steps, and draw those of all."""
    from minicpm.history.scores import by_setting, current_scores

    asked = {_setting(options, job) for job in jobs}
    series = by_setting([score for score in current_scores(history) if score.setting in asked])
    found: dict[int, dict[str, Score]] = {step: {} for step in steps}
    for label, scores in series.items():
        for score in scores:
            found.setdefault(score.step, {})[label] = score
    rows = [
        [
            str(step),
            history.row(step).stage,
            *(found[step][label].text if label in found[step] else "" for label in series),
        ]
        for step in steps
    ]
    out(table(["step", "stage", *series], rows, right=[0, *range(2, 2 + len(series))]))
    if len(history) < 2 or importlib.util.find_spec("matplotlib") is None:
        note("no picture: that takes two checkpoints and matplotlib (pip install 'minicpm[train]')")
    else:
        from minicpm.history.score_picture import draw_scores

        picture = work / "scores.png"
        draw_scores(history, series, picture)
        note(f"samples in {work}, scores against steps in {picture}")
    suggest(f"minicpm history plot {options.source} --score all")
