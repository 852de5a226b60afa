"""`minicpm eval MODEL --tasks …`: score a model, and `minicpm eval --compare A B`: put two runs side by side."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.parser import Parser, UsageError
from minicpm.cli.sampling import add_kv_type
from minicpm.cli.terminal import note, out, suggest, table

if TYPE_CHECKING:
    from minicpm.eval.contract import EvaluatedModel
    from minicpm.eval.results import Scoring
    from minicpm.eval.runner import Progress

_PLAIN_SECONDS = 30


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
    verb.add_argument("--tasks", metavar="NAME,…", help="see --list; a path to a TOML file is a task too")
    verb.add_argument("--list", action="store_true", help="list the tasks")
    verb.add_argument("--data", type=Path, metavar="DIR", help="the folder of the tasks' files (default: the hub)")
    verb.add_argument(
        "--protocol",
        choices=("plain", "ultraeval"),
        default="plain",
        help="plain: greedy, one form a task; ultraeval: the MiniCPM card's (default: plain)",
    )
    verb.add_argument("--limit", type=int, metavar="N", help="the first N rows of each task")
    verb.add_argument("--shots", type=int, metavar="N", help="examples in front, instead of each task's own number")
    verb.add_argument("--batch", type=int, default=64, metavar="N", help="rows between two writes (default: 64)")
    verb.add_argument("--paraphrases", action="store_true", help="also put each task in other words; shows the spread")
    verb.add_argument("--allow-code", action="store_true", help="run programs that the model writes, in a sandbox")
    verb.add_argument("--judge", metavar="URL", help="who rates dialogues: an OpenAI-compatible server")
    verb.add_argument("--judge-model", metavar="NAME", help="its model (default: the first that it lists)")
    verb.add_argument("--with", dest="harness", choices=("lm-eval",), help="run the harness's tasks of these names")
    verb.add_argument("--include", type=Path, metavar="DIR", help="with lm-eval: a folder of further task files")
    verb.add_argument("--dtype", help="bf16, fp16 or fp32, for torch:PATH")
    verb.add_argument("--ctx", type=int, metavar="N", help="context length of the engine")
    verb.add_argument("--threads", type=int, metavar="N", help="of the engine")
    add_kv_type(verb)
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
    for name in ("limit", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.harness:
        _run_harness(options)
    else:
        _evaluate(options)


def _evaluate(options: argparse.Namespace) -> None:
    from minicpm.eval.report import write_report
    from minicpm.eval.runner import Plan, prepare, run
    from minicpm.eval.url_model import UrlModel

    folder = options.out or Path("eval") / Path(options.model.rstrip("/")).name.replace(":", "-")
    drawer = _Drawer()
    plan = Plan(
        tasks=[name for name in options.tasks.split(",") if name],
        out=folder,
        protocol=options.protocol,
        data=options.data,
        limit=options.limit,
        shots=options.shots,
        batch_rows=options.batch,
        with_paraphrases=options.paraphrases,
        allows_code=options.allow_code,
        judge=UrlModel(options.judge, options.judge_model) if options.judge else None,
        report=drawer.draw,
    )
    jobs = prepare(plan)
    model = _open(options)
    facts = {"model": model.name, "runtime": model.runtime}
    try:
        scorings = run(plan, jobs, model, facts)
    finally:
        drawer.end()
    out(_table(scorings))
    page = write_report(folder, facts, options.protocol, scorings)
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


class _Drawer:
    """The line of a run: task, rows, rows per second, time left; plain lines where there is no terminal."""

    def __init__(self) -> None:
        self._is_moving = sys.stderr.isatty()
        self._last = -1e9

    def draw(self, progress: Progress) -> None:
        left = progress.num_rows - progress.num_done
        is_last = left == 0
        now = time.monotonic()
        if not self._is_moving and not is_last and now - self._last < _PLAIN_SECONDS:
            return
        self._last = now
        eta = f", {_clock(left / progress.rows_per_second)} left" if progress.rows_per_second > 0 and left else ""
        rows = f"{progress.num_done}/{progress.num_rows} rows, {progress.rows_per_second:.1f}/s{eta}"
        text = f"{progress.task} ({progress.form}): {rows}"
        if self._is_moving:
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if is_last else ""))
            sys.stderr.flush()
        else:
            note(text)

    def end(self) -> None:
        if self._is_moving:
            sys.stderr.write("\r\x1b[K")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
