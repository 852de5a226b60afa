"""What `minicpm sft` and `minicpm dpo` share: their options, and the way from them to a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm import config as configuration
from minicpm.cli.parser import Parser
from minicpm.cli.run_options import add_memory, memory_of, resuming, show_plan
from minicpm.cli.terminal import note, out, suggest
from minicpm.errors import ConfigError

if TYPE_CHECKING:
    from minicpm.train.tune_config import TuneConfig

METHODS = ("full", "lora", "qlora")
# What the report and practice give; any of it can be set on the command line.
_DEFAULTS: Mapping[str, Sequence[str]] = {
    "": (
        "schedule.total_steps=1",
        "loop.save_every=500",
        "loop.saves_early=false",
        "loop.eval_every=100",
        "schedule.warmup=0.03",
    ),
    "full": ("schedule.lr=1e-3", "schedule.decay=0.9", "optimizer.weight_decay=0.0"),
    "lora": ("schedule.lr=2e-4", "schedule.kind=cosine", "optimizer.weight_decay=0.0"),
    "qlora": ("schedule.lr=2e-4", "schedule.kind=cosine", "optimizer.weight_decay=0.0"),
}
# The report's: 1e-5 for all weights, cosine, without groups.
_PREFERENCE = ("schedule.lr=1e-5", "schedule.kind=cosine", "optimizer.is_mup=false")


def add_tuning(verb: Parser) -> None:
    """Add the options of tuning."""
    verb.add_argument("model", metavar="MODEL", help="a name, a folder, a GGUF file, or RUN@STEP")
    verb.add_argument("words", metavar="ROWS | FIELD=VALUE", nargs="*", help="files of rows; then such as lora.rank=16")
    verb.add_argument("--method", choices=METHODS, default="lora", help="what is trained (default: lora)")
    verb.add_argument("--out", type=Path, default=None, metavar="RUN", help="the run's folder (default: runs/NAME)")
    verb.add_argument("--epochs", type=float, default=None, metavar="N", help="passes over the rows (default: 1)")
    verb.add_argument("--steps", type=int, default=None, metavar="N", help="updates, instead of epochs")
    verb.add_argument("--lr", type=float, default=None, metavar="RATE", help="the peak rate; short for schedule.lr")
    verb.add_argument("--heldout", default=None, metavar="ROWS", help="rows to measure on (default: a twentieth)")
    verb.add_argument("--drop-bad", action="store_true", help="drop and count rows that cannot be used")
    verb.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    add_memory(verb)


def run_tuning(options: argparse.Namespace, goal: str, more: Mapping[str, str]) -> None:
    """Check everything, show the plan, tune, and name the next command.

    Raises:
        SystemExit: 130 or 143 after an interruption that was saved.
    """
    from minicpm.formats.checkpoint import open_checkpoint
    from minicpm.history.naming import resolve
    from minicpm.train.allocator import tune as tune_allocator

    tune_allocator(note)
    from minicpm.train.run_start import find_own
    from minicpm.train.tune import prepare_tuning, tune

    path = resolve(options.model)
    folder = options.out or Path("runs") / f"{_plain_name(options.model)}-{goal}"
    base = open_checkpoint(path)
    # The report's rate is meant for groups; a model without them takes a fiftieth.
    more = {"schedule.lr": "2e-5"} | dict(more) if _is_plain(options, goal, base.config.logit_divisor) else more
    config = tune_config(options, goal, folder.name, more)
    start = find_own(folder, options.resume, note)
    ready = prepare_tuning(config, base, folder, start, note, memory_of(options))
    show_plan(ready.plan, ready.config.batch.tokens_through(ready.start.step))
    end, code = tune(ready, note)
    if code:
        note(f"saved step {end.step} and stopped, as asked")
        note(f"go on with: {resuming(sys.argv[1:])}")
        raise SystemExit(code)
    loss = f", loss {end.last.loss:.4f}" if end.last else ""
    checkpoint = f"{ready.run}/step_{end.step:06d}"
    out(f"done: step {end.step}{loss}; {checkpoint}")
    suggest(f"minicpm chat {checkpoint}" if config.method == "full" else f"minicpm merge {checkpoint} {folder}-merged")


def tune_config(options: argparse.Namespace, goal: str, name: str, more: Mapping[str, str]) -> TuneConfig:
    """Return the configuration that the defaults, the options and the words of the command line give.

    Raises:
        ConfigError: naming what cannot be used.
    """
    from minicpm.train.tune_config import TuneConfig

    is_field = [("=" in word and not Path(word).exists()) for word in options.words]
    sources = [word for word, field in zip(options.words, is_field, strict=True) if not field]
    fields = [word for word, field in zip(options.words, is_field, strict=True) if field]
    given: dict[str, str] = {
        "name": json.dumps(name), "base": json.dumps(options.model), "goal": goal, "method": options.method,
        "rows.sources": json.dumps(sources), "rows.drops_bad": str(options.drop_bad).lower(), **more,
    }  # fmt: skip
    if options.heldout is not None:
        given["rows.heldout"] = json.dumps(options.heldout)
    if options.lr is not None:
        given["schedule.lr"] = repr(options.lr)
    if options.steps is not None and options.epochs is not None:
        raise ConfigError("--steps and --epochs were both given; one of them says how long the run is")
    if options.epochs is not None:
        given["epochs"] = repr(options.epochs)
    if options.steps is not None:
        given |= {"epochs": "0.0", "schedule.total_steps": str(options.steps)}
    if any(word.startswith("schedule.total_steps=") for word in fields):
        given.setdefault("epochs", "0.0")
    words = [*defaults(options.method, goal), *(f"{k}={v}" for k, v in given.items()), *fields]
    return configuration.load(TuneConfig, None, words)


def defaults(method: str, goal: str) -> list[str]:
    """Return what a run has unless it is told otherwise, as section.field=value."""
    return [*_DEFAULTS[""], *_DEFAULTS[method], *(_PREFERENCE if goal == "dpo" else ())]


def _is_plain(options: argparse.Namespace, goal: str, logit_divisor: float) -> bool:
    return bool(options.method == "full" and goal == "sft" and options.lr is None and logit_divisor == 1)


def _plain_name(model: str) -> str:
    return Path(model.replace("@", "-")).name.removesuffix(".gguf") or "model"
