"""`minicpm quantize MODEL --to TYPE`: a 4-bit file that keeps the model's answers, and the report on it."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.parser import Parser, UsageError, add_model
from minicpm.cli.terminal import note, out, suggest, table

if TYPE_CHECKING:
    from minicpm.eval.results import Scoring
    from minicpm.exchange.quantize import Quantization

_PLAIN_SECONDS = 15


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "quantize",
        "Round a model into a GGUF file that every reader of GGUF runs, or a GPTQ or AWQ folder, by looking at text: "
        "errors are fed back into the weights that are not rounded yet. Reads one layer at a time; an interrupted run "
        "goes on. The report compares the result with the original on text that calibration has not seen.",
        examples=[
            "minicpm quantize FOLDER --to q4_k --calibration chat.jsonl",
            "minicpm quantize FOLDER --to q4_0 --bits 4.75 --max-kl 0.05",
            "minicpm quantize smollm2 small.gguf --to q4_0 --requantize --tasks arc_easy --data DIR --limit 100",
        ],
    )
    add_model(verb)
    verb.add_argument(
        "out", metavar="OUT", nargs="?", type=Path, help="the file or folder (default: MODEL-TYPE.gguf, MODEL-gptq)"
    )
    verb.add_argument(
        "--to", required=True, metavar="TYPE",
        help="q4_0 q4_1 q4_k q5_0 q5_1 q5_k q8_0: a GGUF file; gptq, awq: a folder in that layout (transformers, vLLM)",
    )  # fmt: skip
    verb.add_argument(
        "--method",
        default="gptq",
        help="gptq: errors fed back (default); awq, awq+gptq: scaled inputs; search: scales alone; nearest: no text",
    )
    _add_texts(verb)
    verb.add_argument(
        "--embedding", metavar="TYPE", help="of embedding and head (default: q6_k, or q8_0 where it fits)"
    )
    verb.add_argument(
        "--group-size", type=int, metavar="N", help="of a folder: 128, 64 or 32 (default: the largest that divides)"
    )
    verb.add_argument("--bits", type=float, help="bits a weight in all: finer types go where they help most")
    verb.add_argument("--size", help="the same as a size of all tensors, like 1.5GB")
    verb.add_argument("--max-kl", type=float, metavar="NATS", help="write nothing if the mean KL is larger")
    verb.add_argument("--damping", type=float, default=0.01, help="of the Hessian (default: 0.01)")
    verb.add_argument(
        "--shrinkage", type=float, default=0.2, help="of correlations in the Hessian, 0 to 1 (default: 0.2)"
    )
    verb.add_argument("--sweeps", type=int, default=2, help="of descent after error feedback (default: 2)")
    verb.add_argument("--seed", type=int, default=0, help="of the order of rows (default: 0)")
    verb.add_argument("--requantize", action="store_true", help="allow a source that is quantized itself")
    verb.add_argument("--tasks", metavar="NAME,…", help="also score both on these; see `minicpm eval --list`")
    verb.add_argument("--data", type=Path, metavar="DIR", help="the folder of the tasks' files")
    verb.add_argument("--limit", type=int, default=100, metavar="N", help="rows of each task (default: 100)")
    verb.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON too")
    return verb


def _add_texts(verb: Parser) -> None:
    verb.add_argument(
        "--calibration", nargs="+", action="extend", default=[], metavar="FILE",
        help="conversations (put into the model's template) or text; several fill as many windows each, and may be "
        "given by several options (default: Python's documentation, as questions)",
    )  # fmt: skip
    verb.add_argument(
        "--heldout", nargs="+", action="extend", default=[], metavar="FILE",
        help="what the result is judged on (default: a quarter of the calibration's rows, kept apart)",
    )  # fmt: skip
    verb.add_argument("--windows", type=int, default=64, help="windows of calibration (default: 64)")
    verb.add_argument("--window-tokens", type=int, default=512, help="the length of each (default: 512)")
    verb.add_argument("--heldout-windows", type=int, default=16, help="windows of judgement (default: 16)")


def run(options: argparse.Namespace) -> None:
    """Quantize and report."""
    from minicpm.exchange.quantize import FOLDERS, Recipe, quantize
    from minicpm.history.naming import resolve

    if options.bits is not None and options.size is not None:
        raise UsageError("give --bits or --size, not both")
    if options.sweeps < 0:
        raise UsageError(f"--sweeps must be at least 0, got {options.sweeps}")
    source = resolve(options.model)
    name = source.stem if source.is_file() else source.name
    destination = options.out or Path(f"{name}-{options.to}{'' if options.to.lower() in FOLDERS else '.gguf'}")
    recipe = Recipe(
        to=options.to.lower(),
        method=options.method,
        calibration=tuple(options.calibration),
        heldout=tuple(options.heldout),
        windows=options.windows,
        window_tokens=options.window_tokens,
        heldout_windows=options.heldout_windows,
        embedding=options.embedding.lower() if options.embedding else None,
        group_size=options.group_size,
        budget_bytes=_budget(options, source),
        damping=options.damping,
        shrinkage=options.shrinkage,
        sweeps=options.sweeps,
        seed=options.seed,
    )
    drawer = _Drawer()
    result = quantize(
        source,
        destination,
        recipe,
        max_kl=options.max_kl,
        allows_requantizing=options.requantize,
        progress=drawer.draw,
    )
    _show(result)
    if options.tasks:
        out("\n" + _tasks(options, {"original": source, "quantized": destination}))
    if options.report is not None:
        options.report.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    suggest(f"minicpm chat {destination}")


def _budget(options: argparse.Namespace, source: Path) -> int | None:
    if options.size is not None:
        from minicpm.train.plan import parse_bytes

        return parse_bytes(options.size)
    if options.bits is None:
        return None
    from minicpm.formats.checkpoint import open_checkpoint

    return int(options.bits * open_checkpoint(source).config.num_parameters().total / 8)


def _show(result: Quantization) -> None:
    from collections import Counter

    from minicpm.exchange.quantize import worst

    types = ", ".join(f"{kind} ({count})" for kind, count in Counter(result.block_types.values()).most_common())
    size = f"{result.tensor_bytes / 1e6:,.1f} MB of weights, {result.bits_per_weight:.3f} bits a weight, {types}"
    out(f"{result.path}: {size}")
    out(f"{result.closeness.describe()} ({result.heldout})")
    rows = [[name, result.block_types[name], f"{error:.2e}"] for name, error in worst(result.errors, 10)]
    out("\n" + table(["worst matrices", "type", "error of outputs"], rows, right=(2,)))


def _tasks(options: argparse.Namespace, models: dict[str, Path]) -> str:
    """Score every model on the tasks and return the table."""
    import minicpm
    from minicpm.eval.engine_model import EngineModel
    from minicpm.eval.report import describe
    from minicpm.eval.runner import Plan, prepare
    from minicpm.eval.runner import run as run_tasks

    names = [name for name in options.tasks.split(",") if name]
    scored: dict[str, list[Scoring]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in models.items():
            plan = Plan(tasks=names, out=Path(folder) / name, data=options.data, limit=options.limit)
            jobs = prepare(plan)
            model = EngineModel(name, minicpm.load(str(path)))
            scored[name] = run_tasks(plan, jobs, model, {"model": name, "runtime": model.runtime})
    rows = [
        [scoring.task, figure.metric, *(describe(scored[name][i].figures[j]) for name in models), str(figure.num_rows)]
        for i, scoring in enumerate(scored["original"])
        for j, figure in enumerate(scoring.figures)
    ]
    return table(["task", "metric", *models, "n"], rows, right=(2, 3, 4))


class _Drawer:
    """The line of a run: what was done, how far, time left; plain lines where there is no terminal."""

    def __init__(self) -> None:
        self._is_moving = sys.stderr.isatty()
        self._start = self._last = time.monotonic()
        self._total = 0

    def draw(self, name: str, num_done: int, num_parts: int) -> None:
        """Show that `num_done` of `num_parts` are done, `name` the last."""
        now = time.monotonic()
        if num_parts != self._total:
            self._start, self._total = now, num_parts
        is_last = num_done == num_parts
        if not self._is_moving and not is_last and now - self._last < _PLAIN_SECONDS:
            return
        self._last = now
        left = (now - self._start) / num_done * (num_parts - num_done)
        text = f"{name}: {num_done}/{num_parts}" + ("" if is_last else f", {left:.0f} s left")
        if self._is_moving:
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if is_last else ""))
            sys.stderr.flush()
        else:
            note(text)
