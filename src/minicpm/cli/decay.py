"""`minicpm decay RUN@STEP --steps N`: the decay stage from any checkpoint, with other data mixed in."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.parser import Parser
from minicpm.cli.run_options import add_memory, memory_of, run_to_end
from minicpm.cli.terminal import note
from minicpm.errors import ConfigError

if TYPE_CHECKING:
    from minicpm.data.mixture import MixKind


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "decay",
        "Let the learning rate of a checkpoint decay, to the same bits as a run that decayed there. Data mixed in now "
        "counts most: the report found instructions in the decay worth more than more of them afterwards.",
        examples=[
            "minicpm decay runs/nano@1500 --steps 150",
            "minicpm decay runs/nano@1500 --steps 150 --rows chats.jsonl:0.3 --out runs/nano-chat",
        ],
    )
    verb.add_argument("start", metavar="RUN@STEP", help="a run's folder and one of its checkpoints")
    verb.add_argument("--steps", type=int, required=True, metavar="N", help="the length of the decay")
    verb.add_argument("--kind", default="", metavar="K", help="wsd-exp, wsd-linear or wsd-sqrt (default: the run's)")
    verb.add_argument("--mix", action="append", default=[], metavar="PATH:SHARE", help="text, and its share of tokens")
    verb.add_argument("--rows", action="append", default=[], metavar="PATH:SHARE", help="conversations, likewise")
    verb.add_argument("--out", type=Path, default=None, metavar="RUN", help="(default: RUN-decay-STEP)")
    verb.add_argument("--resume", action="store_true", help="go on with an interrupted decay")
    add_memory(verb)
    return verb


def run(options: argparse.Namespace) -> None:
    """Check everything, show the plan, train."""
    from minicpm.train.allocator import tune

    parent, step = parse_start(options.start)
    shares = [parse_share(text, "text") for text in options.mix] + [parse_share(text, "rows") for text in options.rows]
    if options.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {options.steps}")
    tune(note)
    from minicpm.train.branch import branch_config
    from minicpm.train.pretrain import prepare
    from minicpm.train.run_start import branch_from, find_start

    start = branch_from(parent, step)
    if not start.has_state:
        note(f"step {step} comes from the history, which is weights alone: the optimizer's moments begin at zero")
    config = branch_config(start, parent, options.steps, options.kind, shares)
    folder = options.out or parent.with_name(f"{parent.name}-decay-{step}")
    config = dataclasses.replace(config, name=folder.name)
    # Its own checkpoints come first; before it has any, it begins at its parent's.
    own = find_start(folder, config, options.resume, note)
    run_to_end(prepare(config, folder, own if own.manifest else start, note, memory_of(options)))


def parse_start(text: str) -> tuple[Path, int]:
    """Return the folder and step of RUN@STEP.

    Raises:
        ConfigError: it is not of that form, or there is no such folder.
    """
    folder, separator, step = text.rpartition("@")
    if not separator or not step.isdigit():
        raise ConfigError(f"{text!r} is not of the form RUN@STEP, such as runs/nano@1500")
    if not Path(folder).is_dir():
        raise ConfigError(f"there is no run {folder!r}; the folder of `minicpm pretrain` is meant")
    return Path(folder), int(step)


def parse_share(text: str, kind: MixKind) -> tuple[str, float, MixKind]:
    """Return (path, share, kind) of PATH:SHARE.

    Raises:
        ConfigError: it is not of that form.
    """
    path, _, share = text.rpartition(":")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not path or not 0 < value < 1:
        raise ConfigError(
            f"{text!r} is not of the form PATH:SHARE with a share between 0 and 1, such as chats.jsonl:0.3"
        )
    return path, value, kind
