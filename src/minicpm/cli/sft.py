"""`minicpm sft MODEL ROWS …`: a model learns to answer as the rows do."""

from __future__ import annotations

import argparse
import json

from minicpm.cli.parser import Parser
from minicpm.cli.tuning import add_tuning, run_tuning


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "sft",
        "Supervised tuning on conversations and instructions: answers alone are targets. Rows are checked wholly "
        "before a model is loaded. `minicpm data show ROWS --rows` colours what is learned.",
        examples=[
            "minicpm sft smollm2 chats.jsonl --epochs 2",
            "minicpm sft runs/nano@2000 chats.jsonl --method full --lr 1e-3",
            "minicpm sft model.gguf chats.jsonl --method qlora lora.rank=16 batch.sequence_length=1024",
            "minicpm sft smollm2 --identity 'name=Ada,author=the Ada project' --epochs 8",
        ],
    )
    add_tuning(verb)
    verb.add_argument("--turns", choices=("last", "all"), default="last", help="which answers are targets")
    verb.add_argument(
        "--identity", default="", metavar="name=…,author=…", help="mix in rows that teach the model its own name"
    )
    return verb


def run(options: argparse.Namespace) -> None:
    """Check everything, show the plan, tune."""
    more = {"rows.turns": options.turns, "rows.identity": json.dumps(options.identity, ensure_ascii=False)}
    run_tuning(options, "sft", more)
