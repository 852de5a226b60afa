"""`minicpm compare A B`: how far two models, or two runtimes of one, agree on the next token."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from minicpm.cli.parser import Parser
from minicpm.cli.terminal import note, out
from minicpm.errors import DataError


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "compare",
        "Compare two models token by token on one text: KL divergence, top-1 agreement, log-probabilities. A model is "
        "a name, a path, or KIND:PATH with KIND one of engine, torch, transformers, llama.cpp; B may also be the URL "
        "of an OpenAI-compatible server.",
        examples=[
            "minicpm compare model.gguf llama.cpp:model.gguf",
            "minicpm compare torch:folder transformers:folder --dtype-a fp32 --dtype-b fp32",
            "minicpm compare folder http://127.0.0.1:8000/v1",
        ],
    )
    verb.add_argument("a", metavar="A", help="the model that the other is held to; its tokenizer is used")
    verb.add_argument("b", metavar="B", help="the other model")
    verb.add_argument("--text", type=Path, metavar="FILE", help="what both read (default: a built-in page)")
    verb.add_argument("--max-tokens", type=int, default=512, help="cut the text there (default: 512)")
    verb.add_argument("--dtype-a", help="bf16, fp16 or fp32, for torch and transformers")
    verb.add_argument("--dtype-b", help="likewise for B")
    verb.add_argument("--json", action="store_true", help="the numbers as JSON")
    return verb


def run(options: argparse.Namespace) -> None:
    """Compare and print the numbers."""
    from minicpm.exchange.check import TEXT
    from minicpm.exchange.compare import compare

    text = TEXT
    if options.text is not None:
        try:
            text = options.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {options.text}: {error}; a text file in UTF-8 is needed") from error
    result = compare(
        _resolved(options.a),
        _resolved(options.b),
        text=text,
        dtype_a=options.dtype_a,
        dtype_b=options.dtype_b,
        max_tokens=options.max_tokens,
    )
    for name, dtypes in zip((options.a, options.b), result.dtypes, strict=True):
        note(f"{name}: {dtypes}")
    if options.json:
        out(json.dumps(dataclasses.asdict(result.agreement), indent=2))
    else:
        out(result.agreement.describe())
    if result.tokenizer_difference:
        note(result.tokenizer_difference)


def _resolved(spec: str) -> str:
    """Return the backend's name with a pinned or cached name replaced by its path."""
    from minicpm.exchange.backends import BACKENDS
    from minicpm.exchange.compare import local_path
    from minicpm.history.naming import parse_step, resolve

    # A step's own colons, of a URL or of its precision, are not those of a backend.
    if spec.partition(":")[0] not in BACKENDS and parse_step(spec) is not None:
        return str(resolve(spec))
    name = local_path(spec)
    if name is None:
        return spec
    return f"{spec.removesuffix(name)}{resolve(name)}"
