"""`minicpm convert SRC DST --to FORMAT`: any model into any format, checked."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm.architecture import MODEL_TYPES
from minicpm.cli.parser import Parser
from minicpm.cli.terminal import out, suggest


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "convert",
        "Convert a model: folders for transformers (minicpm, granite, llama) and GGUF files, in any dtype. What is "
        "written appears whole or not at all, is read back, and is compared with its source.",
        examples=[
            "minicpm convert openbmb-folder out --to granite",
            "minicpm convert out model.gguf --to gguf --dtype q4_0",
            "minicpm convert smollm2 smollm2-hf --to llama --dtype fp16",
        ],
    )
    verb.add_argument("source", metavar="SRC", help="a name that `minicpm models` shows, a GGUF file, or a folder")
    verb.add_argument("destination", metavar="DST", type=Path, help="what to write; must not exist yet")
    verb.add_argument("--to", required=True, metavar="FORMAT", help="minicpm, granite, llama (folders) or gguf")
    verb.add_argument("--dtype", help="bf16, fp16, fp32; gguf also q8_0 q4_0 q4_1 q5_0 q5_1 q4_k q5_k q6_k")
    verb.add_argument("--family", choices=MODEL_TYPES, help="the architecture inside a GGUF (default: the source's)")
    verb.add_argument("--license", dest="licence", help="the licence for the card (default: the source's)")
    verb.add_argument("--no-verify", action="store_true", help="do not run both models on a fixed text afterwards")
    verb.add_argument("--allow-pickle", action="store_true", help="read a pytorch_model.bin (weights only)")
    return verb


def run(options: argparse.Namespace) -> None:
    """Convert, and say what was written and how it compares."""
    from minicpm.exchange.convert import convert
    from minicpm.history.naming import resolve

    result = convert(
        resolve(options.source),
        options.destination,
        to=options.to,
        dtype=options.dtype,
        family=options.family,
        licence=options.licence,
        is_verified=not options.no_verify,
        allow_pickle=options.allow_pickle,
    )
    out(result.describe())
    if result.agreement is not None:
        out(f"against the source: {result.agreement.describe()}")
    suggest(f"minicpm chat {options.destination}")
