"""`minicpm dpo MODEL PAIRS …`: a model learns which of two answers is preferred, or which answers are good."""

from __future__ import annotations

import argparse

from minicpm.cli.parser import Parser
from minicpm.cli.tuning import add_tuning, run_tuning


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "dpo",
        "Preference tuning on pairs (DPO, IPO) or on judged answers (KTO). The reference is the model at its start, "
        "whose log-probabilities are computed once: one model is in memory. Held-out accuracy stands beside that of "
        "the rule that the longer answer wins.",
        examples=[
            "minicpm dpo runs/chat-sft/step_000400 pairs.jsonl",
            "minicpm dpo smollm2 pairs.jsonl --loss ipo preference.beta=0.2",
            "minicpm dpo smollm2 judged.jsonl --loss kto --lr 5e-5",
        ],
    )
    add_tuning(verb)
    verb.add_argument("--loss", choices=("sigmoid", "ipo", "kto"), default="sigmoid", help="(default: sigmoid, DPO)")
    return verb


def run(options: argparse.Namespace) -> None:
    """Check everything, show the plan, tune."""
    run_tuning(options, "dpo", {"preference.loss": options.loss})
