"""`minicpm quantize MODEL --to TYPE`: a 4-bit file that keeps the model's answers, and the report on it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.parser import Parser, UsageError, add_model
from minicpm.cli.terminal import note, out, suggest, table

if TYPE_CHECKING:
    from minicpm.eval.compare import Change
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
    _add_rounding(verb)
    verb.add_argument("--seed", type=int, default=0, help="of the order of rows (default: 0)")
    verb.add_argument("--requantize", action="store_true", help="allow a source that is quantized itself")
    _add_tasks(verb)
    verb.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON too")
    return verb


def _add_rounding(verb: Parser) -> None:
    verb.add_argument("--damping", type=float, default=0.01, help="of the Hessian (default: 0.01)")
    verb.add_argument(
        "--shrinkage", type=float, default=0.2, help="of correlations in the Hessian, 0 to 1 (default: 0.2)"
    )
    verb.add_argument("--sweeps", type=int, default=2, help="of descent after error feedback (default: 2)")
    verb.add_argument(
        "--recover", type=int, default=0, metavar="STEPS",
        help="then tune scales and norms towards the unquantized model's answers, a window a step (default: 0)",
    )  # fmt: skip
    verb.add_argument(
        "--recover-rate", type=float, default=1e-3, help="of those steps, relative to each scale (default: 0.001)"
    )


def _add_tasks(verb: Parser) -> None:
    verb.add_argument(
        "--tasks", metavar="NAME,…", default="",
        help="both models are scored on these, see `minicpm eval --list`; none: on nothing (default: arc_easy, piqa, "
        "winogrande, lambada as far as --data has them, else which of four continuations follows a held-out row)",
    )  # fmt: skip
    verb.add_argument("--data", type=Path, metavar="DIR", help="the folder of the tasks' files (default: the hub)")
    verb.add_argument("--limit", type=int, default=32, metavar="N", help="rows of each task (default: 32)")


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
    from minicpm.exchange.quantize import quantize
    from minicpm.exchange.recipe import FOLDERS, Recipe
    from minicpm.history.naming import resolve

    _check(options)
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
        recover=options.recover,
        recover_rate=options.recover_rate,
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
    changes = _score(options, source, result) if options.tasks != "none" else []
    if options.report is not None:
        report = result.to_dict() | {"tasks": [asdict(change) for change in changes]}
        options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    suggest(f"minicpm chat {destination}")


def _check(options: argparse.Namespace) -> None:
    if options.bits is not None and options.size is not None:
        raise UsageError("give --bits or --size, not both")
    if options.bits is not None and not 0 < options.bits < 32:
        raise UsageError(f"--bits must be between 0 and 32, got {options.bits}")
    if options.max_kl is not None and not options.max_kl >= 0:
        raise UsageError(f"--max-kl must be at least 0 nats, got {options.max_kl}")
    for name, folder in {"--data": options.data, "--report": options.report and options.report.parent}.items():
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{name}: {folder} is no folder")
    if options.sweeps < 0:
        raise UsageError(f"--sweeps must be at least 0, got {options.sweeps}")
    if options.limit < 1:
        raise UsageError(f"--limit must be at least 1, got {options.limit}")
    if names := _task_names(options):
        from minicpm.exchange.task_table import check_tasks

        check_tasks(names, options.data, options.limit)


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
    if result.before_recovery is not None:
        out(f"before recovery: {result.before_recovery.describe()}")
    rows = [[name, result.block_types[name], f"{error:.2e}"] for name, error in worst(result.errors, 10)]
    out("\n" + table(["worst matrices", "type", "error of outputs"], rows, right=(2,)))


def _task_names(options: argparse.Namespace) -> list[str]:
    return [name for name in options.tasks.split(",") if name not in ("", "none")]


def _score(options: argparse.Namespace, source: Path, result: Quantization) -> list[Change]:
    """Put both models to the tasks, show the table, and return it."""
    from minicpm.exchange.task_table import compare_on_tasks

    names = _task_names(options)
    changes = compare_on_tasks(source, result.path, names, options.data, result.heldout_texts, options.limit)
    out("\n" + (_task_table(changes) if changes else "no task: the held-out text is too short to make one of it"))
    return changes


def _task_table(changes: Sequence[Change]) -> str:
    from minicpm.eval.report import describe
    from minicpm.exchange.task_table import CONTINUATION

    rows = [
        [
            Path(change.task).stem,
            change.a.metric,
            describe(change.a),
            describe(change.b),
            f"{change.difference.difference:+.4f} ± {change.difference.stderr:.4f}",
            f"{change.difference.p_value:.3g}",
            str(change.difference.num_rows),
        ]
        for change in changes
    ]
    text = table(["task", "metric", "original", "quantized", "paired", "p", "n"], rows, right=(2, 3, 4, 5, 6))
    if [row[0] for row in rows] == [CONTINUATION]:
        text += "\ncontinuation: which of four follows a held-out row; --data DIR takes published tasks instead"
    return text


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
