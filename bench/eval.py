"""HellaSwag rows per second: our engine against lm-evaluation-harness's `hf` backend in bf16 at its best batch size.

Same model (the default one; the peer reads it as a bf16 folder made by `minicpm convert`), same rows, same questions.
`--data DIR` holds `hellaswag_val.jsonl[.gz]`. With `--equal N` it says instead, for N rows of each of five tasks, how
far our torch model (fp32) and our engine are from the `hf` backend in fp32, on the default model or a tiny one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from equality import TASKS, Harness, pairs_of, print_equalities, questions_of, write_tiny_model
from rows import Row, arguments, compare, finish, rounds_of, take_turns

import minicpm
from minicpm.cli.main import run as run_verb
from minicpm.eval.contract import EvaluatedModel
from minicpm.eval.engine_model import EngineModel
from minicpm.eval.forms import Question
from minicpm.hub import resolve

BATCHES = (1, 8, 16, 64)
MUST = 5.0


def rate(score: Callable[[Sequence[tuple[str, str]]], Any], questions: Sequence[Question]) -> float:
    """Rows per second."""
    start = time.perf_counter()
    score(pairs_of(questions))
    return len(questions) / (time.perf_counter() - start)


def speed(model: EvaluatedModel, folder: Path, questions: Sequence[Question], rounds: int) -> Row:
    few = questions[: max(4, len(questions) // 4)]
    rates = {size: rate(Harness(folder, "bfloat16", size).loglikelihood, few) for size in BATCHES}
    best = max(rates, key=rates.__getitem__)
    print("hf, rows/s by batch size: " + ", ".join(f"{size}: {value:.2f}" for size, value in rates.items()))
    harness = Harness(folder, "bfloat16", best)
    turn = [0]

    def fresh() -> Sequence[Question]:
        # Other rows each round: none may come from a cache of the round before.
        turn[0] += 1
        size = len(questions) // (2 * rounds)
        return questions[turn[0] * size % len(questions) :][:size]

    samples = take_turns(
        {"ours": lambda: rate(model.loglikelihood, fresh()), "hf": lambda: rate(harness.loglikelihood, fresh())}, rounds
    )
    return compare(
        "hellaswag", samples.median("ours"), samples.median("hf"), f"lm-eval hf, bf16, batch {best}", "rows/s", MUST,
        disturbed=samples.disturbed,
    )  # fmt: skip


def converted(path: Path, folder: Path, dtype: str) -> Path:
    if run_verb(["convert", str(path), str(folder), "--to", "llama", "--dtype", dtype, "--no-verify"]):
        raise SystemExit("the default model cannot be converted")
    return folder


def equal(options: argparse.Namespace, path: Path, scratch: Path) -> None:
    from minicpm.eval.torch_model import TorchModel

    exact, source = converted(path, scratch / "fp32", "fp32"), path
    if options.model == "tiny":
        write_tiny_model(exact, scratch / "tiny")
        exact = source = scratch / "tiny"
    models: list[tuple[str, Callable[[], EvaluatedModel]]] = [
        ("torch fp32", lambda: TorchModel("torch", exact, "fp32")),
        ("engine", lambda: EngineModel("engine", minicpm.load(source))),
    ]
    print_equalities(exact, models, options.tasks.split(","), options.data, options.equal)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "eval")
    parser.add_argument("--equal", type=int, metavar="N", help="instead compare scores on N rows of each task")
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2", help="of --equal (%(default)s)")
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="NAME,…", help="of --equal (%(default)s)")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"no evaluation data in {options.data}; name its folder by --data")
    path = resolve("smollm2")
    with tempfile.TemporaryDirectory() as scratch:
        if options.equal:
            equal(options, path, Path(scratch))
            return
        folder = converted(path, Path(scratch) / "bf16", "bf16")
        with minicpm.load(path) as model:
            questions = questions_of("hellaswag", options.data, 32 if options.quick else 160)
            rows = [speed(EngineModel("smollm2", model), folder, questions, rounds_of(options))]
    finish(rows, options)


if __name__ == "__main__":
    main()
