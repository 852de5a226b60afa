"""`minicpm merge ADAPTER OUT`: one whole model of an adapter and its base, checked."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm.cli.parser import Parser
from minicpm.cli.terminal import out, suggest


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "merge",
        "Multiply an adapter into its base, in float32 and rounded once. Both are run on a fixed text afterwards, and "
        "the largest difference of a logit is printed. Blocks (int4) are refused: they would lose the adapter.",
        examples=[
            "minicpm merge runs/smollm2-sft/step_000400 merged --dtype bf16",
            "minicpm merge peft-folder merged --base openbmb-folder",
        ],
    )
    verb.add_argument("adapter", metavar="ADAPTER", help="a folder in PEFT's format, or RUN@STEP")
    verb.add_argument("destination", metavar="OUT", type=Path, help="the folder to write; must not exist yet")
    verb.add_argument("--base", default=None, metavar="MODEL", help="its base (default: the one that it names)")
    verb.add_argument("--dtype", default=None, help="bf16, fp16 or fp32 (default: the base's)")
    verb.add_argument("--no-verify", action="store_true", help="do not run both models on a fixed text afterwards")
    return verb


def run(options: argparse.Namespace) -> None:
    """Merge, and say how the result compares."""
    from minicpm.exchange.merge import merge
    from minicpm.history.naming import resolve

    merged = merge(
        resolve(options.adapter),
        options.destination,
        base=resolve(options.base) if options.base is not None else None,
        dtype=options.dtype,
        is_verified=not options.no_verify,
        find_base=resolve,
    )
    out(f"{merged.path}: {merged.num_changed} weights changed, {merged.dtype}")
    if merged.agreement is not None:
        out(f"against base and adapter: max |Δ logit| {merged.max_delta_logit:.3g}; {merged.agreement.describe()}")
    suggest(f"minicpm chat {merged.path}")
