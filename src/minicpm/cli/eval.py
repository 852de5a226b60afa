"""`minicpm eval MODEL --tasks …`: score a model, and `minicpm eval --compare A B`: put two runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.evaluating import Drawer, add_evaluation, check_evaluation, make_plan
from minicpm.cli.parser import Parser, UsageError
from minicpm.cli.terminal import note, out, suggest, table

if TYPE_CHECKING:
    from minicpm.eval.contract import EvaluatedModel
    from minicpm.eval.results import Scoring


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "eval",
        "Score a model on published tasks: a table of figures with standard errors, every sample in a file, a page. "
        "A run that was interrupted goes on where it stopped. Both ways of scoring a task are shown where the protocol "
        "has both, never the better one alone.",
        examples=[
            "minicpm eval smollm2 --tasks arc_easy,hellaswag --data DIR --limit 200",
            "minicpm eval torch:FOLDER --dtype fp32 --tasks piqa --data DIR",
            "minicpm eval smollm2 --tasks humaneval --allow-code --data DIR",
            "minicpm eval http://127.0.0.1:8000/v1 --tasks mt_bench --judge http://127.0.0.1:9000/v1 --data DIR",
            "minicpm eval --compare eval/before eval/after",
        ],
    )
    verb.add_argument("model", metavar="MODEL", nargs="?", help="a name, a GGUF file, a folder, torch:PATH, or a URL")
    verb.add_argument("--list", action="store_true", help="list the tasks")
    add_evaluation(verb)
    verb.add_argument("--with", dest="harness", choices=("lm-eval",), help="run the harness's tasks of these names")
    verb.add_argument("--include", type=Path, metavar="DIR", help="with lm-eval: a folder of further task files")
    verb.add_argument("--dtype", help="bf16, fp16 or fp32, for torch:PATH")
    verb.add_argument("--out", type=Path, metavar="DIR", help="samples and results (default: eval/MODEL)")
    verb.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="two folders of results, paired by rows"
    )
    return verb


def run(options: argparse.Namespace) -> None:
    """Score, list or compare."""
    if options.compare:
        _compare(*options.compare)
        return
    if options.list:
        _list()
        return
    if not options.model or not options.tasks:
        raise UsageError("name a MODEL and its --tasks NAME,… (`minicpm eval --list` shows them)")
    check_evaluation(options)
    if options.harness:
        _run_harness(options)
    else:
        _evaluate(options)


def _evaluate(options: argparse.Namespace) -> None:
    from minicpm.eval.report import write_report
    from minicpm.eval.results import read_results
    from minicpm.eval.runner import prepare, run

    folder = options.out or Path("eval") / Path(options.model.rstrip("/")).name.replace(":", "-")
    drawer = Drawer()
    plan = make_plan(options, folder, drawer.draw)
    jobs = prepare(plan)
    model = _open(options)
    facts = {"model": model.name, "runtime": model.runtime}
    try:
        scorings = run(plan, jobs, model, facts)
    finally:
        drawer.end()
    out(_table(scorings))
    page = write_report(folder, facts, options.protocol, read_results(folder)[1])
    note(f"{model.name}: {model.runtime}; samples and results in {folder}, page {page}")
    suggest(f"minicpm eval --compare {folder} OTHER")


def _run_harness(options: argparse.Namespace) -> None:
    try:
        from minicpm.eval.lm_eval_bridge import evaluate
    except ImportError as error:
        raise UsageError(f"lm-eval is not installed ({error}); pip install 'minicpm[eval]'") from error
    tasks = [name for name in options.tasks.split(",") if name]
    model = _open(options)
    _, text = evaluate(model, tasks, limit=options.limit, shots=options.shots, include=options.include)
    out(text)


def _open(options: argparse.Namespace) -> EvaluatedModel:
    import minicpm
    from minicpm.history.naming import resolve

    spec = options.model
    if spec.startswith(("http://", "https://")):
        from minicpm.eval.url_model import UrlModel

        return UrlModel(spec)
    if spec.startswith("torch:"):
        from minicpm.eval.torch_model import TorchModel

        return TorchModel(spec, resolve(spec.removeprefix("torch:")), options.dtype)
    if options.dtype:
        raise UsageError("--dtype is for torch:PATH; the engine computes in the file's own types")
    from minicpm.eval.engine_model import EngineModel

    return EngineModel(
        spec, minicpm.load(spec, context_length=options.ctx, num_threads=options.threads, kv_type=options.kv_type)
    )


def _table(scorings: list[Scoring]) -> str:
    from minicpm.eval.report import describe, spread

    rows = [
        [scoring.task, scoring.form, str(scoring.shots), figure.metric, describe(figure), str(figure.num_rows)]
        for scoring in scorings
        for figure in scoring.figures
    ]
    text = table(["task", "form", "shots", "metric", "value ± stderr", "n"], rows, right=(2, 4, 5))
    spreads = [[task, metric, f"{low:.4f}", f"{high:.4f}"] for task, metric, low, high in spread(scorings)]
    if spreads:
        text += "\n\n" + table(["over phrasings", "metric", "lowest", "highest"], spreads, right=(2, 3))
    return text


def _compare(a: Path, b: Path) -> None:
    from minicpm.eval.compare import compare_runs
    from minicpm.eval.report import describe

    rows: list[list[str]] = []
    for change in compare_runs(a, b):
        d = change.difference
        paired = f"{d.difference:+.4f} ± {d.stderr:.4f}"
        figures = describe(change.a), describe(change.b)
        rows.append([change.task, change.form, change.a.metric, *figures, paired, f"{d.p_value:.3g}", str(d.num_rows)])
    header = ["task", "form", "metric", str(a), str(b), "B - A, paired", "p", "n"]
    out(table(header, rows, right=(3, 4, 5, 6, 7)))


def _list() -> None:
    from minicpm.eval.task import load_task, task_names

    rows = []
    for name in task_names():
        task = load_task(name)
        rows.append([name, ", ".join(dict.fromkeys(form.mode for form in task.form)), task.file, task.source])
    out(table(["task", "asks for", "file", "source"], rows))
