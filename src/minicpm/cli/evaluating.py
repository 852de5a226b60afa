"""What `minicpm eval` and `minicpm history eval` share: the options that make a plan, and the line of a run."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.parser import Parser, UsageError
from minicpm.cli.sampling import add_kv_type
from minicpm.cli.terminal import note

if TYPE_CHECKING:
    from minicpm.eval.results import Scoring
    from minicpm.eval.runner import Plan, Progress

_PLAIN_SECONDS = 30


def add_evaluation(verb: Parser) -> None:
    """Add the options that `make_plan` reads, and those of the engine."""
    verb.add_argument(
        "--tasks", metavar="NAME,…", help="see `minicpm eval --list`; a path to a TOML file is a task too"
    )
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
    verb.add_argument("--ctx", type=int, metavar="N", help="context length of the engine")
    verb.add_argument("--threads", type=int, metavar="N", help="of the engine")
    add_kv_type(verb)


def check_evaluation(options: argparse.Namespace) -> None:
    """Return if the options can make a plan.

    Raises:
        UsageError: they cannot.
    """
    for name, least in (("limit", 1), ("batch", 1), ("shots", 0)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if not any(options.tasks.split(",")):
        raise UsageError(f"--tasks names none, got {options.tasks!r}; `minicpm eval --list` shows them")


def make_plan(
    options: argparse.Namespace,
    out: Path,
    report: Callable[[Progress], None],
    on_scoring: Callable[[Scoring], None] = lambda scoring: None,
) -> Plan:
    """Return the plan that the options ask for."""
    from minicpm.eval.runner import Plan
    from minicpm.eval.url_model import UrlModel

    return Plan(
        tasks=[name for name in options.tasks.split(",") if name],
        out=out,
        protocol=options.protocol,
        data=options.data,
        limit=options.limit,
        shots=options.shots,
        batch_rows=options.batch,
        with_paraphrases=options.paraphrases,
        allows_code=options.allow_code,
        judge=UrlModel(options.judge, options.judge_model) if options.judge else None,
        report=report,
        on_scoring=on_scoring,
    )


class Drawer:
    """The line of a run: task, rows, rows per second, time left; plain lines where there is no terminal."""

    def __init__(self) -> None:
        self._is_moving = sys.stderr.isatty()
        self._last = -1e9

    def draw(self, progress: Progress) -> None:
        """Show how far a scoring is."""
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
        """Leave the line."""
        if self._is_moving:
            sys.stderr.write("\r\x1b[K")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
