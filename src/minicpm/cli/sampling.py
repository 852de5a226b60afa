"""The options that shape a reply, the same for every verb that generates."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from minicpm.cli.parser import UsageError

# Option -> keyword of the engine, the type, and the help. The engine checks the ranges: the Python API needs that too.
_NUMBERS: Sequence[tuple[str, type, str]] = (
    ("temperature", float, "how freely to choose; 0 always takes the likeliest token"),
    ("top_p", float, "choose among the likeliest tokens that together have this probability"),
    ("top_k", int, "choose among this many likeliest tokens; 0 is all"),
    ("min_p", float, "leave out tokens less likely than this times the likeliest"),
    ("repetition_penalty", float, "divide the score of tokens that occurred; 1 is off"),
    ("presence_penalty", float, "subtract this from the score of tokens that occurred"),
    ("frequency_penalty", float, "subtract this for each time that a token occurred"),
    ("seed", int, "the same seed gives the same text"),
)


def add_sampling(parser: argparse.ArgumentParser, name_of_max_tokens: str = "max_new_tokens") -> None:
    """Add the options of sampling and stopping, and of the machine that runs the model."""
    group = parser.add_argument_group("sampling")
    for name, kind, text in _NUMBERS:
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kind, metavar="N", help=text)
    group.add_argument("--greedy", action="store_true", help="always take the likeliest token (temperature 0)")
    group.add_argument("--max-tokens", dest=name_of_max_tokens, type=int, metavar="N", help="stop after so many tokens")
    group.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; may be given again")
    group = parser.add_argument_group("machine")
    group.add_argument("--threads", type=int, metavar="N", help="processor threads; default: every physical core")
    group.add_argument(
        "--speculate",
        choices=("ngram", "off"),
        help="guess the next tokens from what the text repeats and compute them together; changes the pace, never the "
        "text (default: ngram)",
    )
    group.add_argument(
        "--draft", metavar="MODEL", help="guess them with this smaller model instead, which needs the same vocabulary"
    )
    add_kv_type(group)
    group.add_argument("--ctx", type=int, metavar="N", help="context in tokens; default: what the model was trained on")


def add_kv_type(parser: argparse._ActionsContainer) -> None:
    """Add `--kv-type`."""
    parser.add_argument(
        "--kv-type",
        metavar="TYPE",
        help="how keys and values are kept: f16, bf16, f32, or q8, about half of f16's memory (default: f16, or f32 "
        "for a model of float weights)",
    )


def sampling_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the given options as keywords of the engine; what was not given keeps the engine's default.

    Raises:
        UsageError: --greedy with a temperature.
    """
    if options.greedy and options.temperature:
        raise UsageError(
            f"--greedy is temperature 0, but --temperature {options.temperature:g} was given; leave one out"
        )
    if options.draft and options.speculate:
        raise UsageError(f"--draft and --speculate {options.speculate} are two ways to guess; leave one out")
    names = [*(name for name, _, _ in _NUMBERS), "max_new_tokens", "stop", "speculate"]
    settings = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.greedy:
        settings["temperature"] = 0.0
    return settings
