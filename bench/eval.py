"""HellaSwag rows per second: our engine against lm-evaluation-harness's `hf` backend in bf16 at its best batch size.

Same model (the default one; the peer reads it as a bf16 folder made by `minicpm convert`), same rows, same questions.
`--data DIR` holds `hellaswag_val.jsonl[.gz]`. With `--equal N` it also says, for N rows of each of five tasks, how far
our torch model (fp32) and our engine are from the `hf` backend in fp32.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rows import Row, arguments, compare, finish, rounds_of, take_turns

import minicpm
from minicpm.cli.main import run as run_verb
from minicpm.eval.contract import EvaluatedModel, Scored
from minicpm.eval.engine_model import EngineModel
from minicpm.eval.forms import FormReader, Question
from minicpm.eval.rows import read_task
from minicpm.eval.task import load_task
from minicpm.hub import resolve

BATCHES = (1, 8, 16, 64)
EQUAL_TASKS = ("arc_easy", "hellaswag", "piqa", "winogrande", "lambada")
MUST = 5.0


class Harness:
    """The `hf` backend of lm-evaluation-harness."""

    def __init__(self, folder: Path, dtype: str, batch_size: int) -> None:
        from lm_eval.models.huggingface import HFLM

        self.model = HFLM(pretrained=str(folder), dtype=dtype, device="cpu", batch_size=batch_size)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each pair."""
        from lm_eval.api.instance import Instance

        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        return [
            (float(logprob), bool(greedy)) for logprob, greedy in self.model.loglikelihood(asked, disable_tqdm=True)
        ]


def questions_of(name: str, data: Path, count: int) -> list[Question]:
    task = load_task(name)
    rows = read_task(name, task, data)
    return FormReader(task.forms("plain")[0], name).questions(rows.rows[:count], rows.examples)


def pairs_of(questions: Sequence[Question]) -> list[tuple[str, str]]:
    return [pair for question in questions for pair in question.pairs]


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


def equality(name: str, model: EvaluatedModel, harness: Harness, questions: Sequence[Question]) -> str:
    """A line on how far the scores of `model` are from the harness's; the bound of n tokens is 0.1 sqrt(n / 30)."""
    pairs = pairs_of(questions)
    ours: list[Scored] = model.loglikelihood(pairs)
    theirs = harness.loglikelihood(pairs)
    gaps = [abs(o.logprob - t[0]) for o, t in zip(ours, theirs, strict=True)]
    bounds = [0.1 * math.sqrt(o.num_tokens / 30) for o in ours]
    share = statistics.mean(gap / bound for gap, bound in zip(gaps, bounds, strict=True))
    differing, start = 0, 0
    for question in questions:
        stop = start + len(question.pairs)
        if stop - start == 1:
            differing += ours[start].is_greedy != theirs[start][1]
        else:
            choices = range(start, stop)
            differing += max(choices, key=lambda i: ours[i].logprob) != max(choices, key=lambda i: theirs[i][0])
        start = stop
    gap = f"|log-likelihood gap| mean {statistics.mean(gaps):.2e}, largest {max(gaps):.2e}"
    return f"{name}: {len(questions)} rows, choices that differ {differing}, {gap}, mean share of the bound {share:.3f}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "eval")
    parser.add_argument("--equal", type=int, metavar="N", help="also compare scores on N rows of each of five tasks")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"no evaluation data in {options.data}; name its folder by --data")
    rounds = rounds_of(options)
    path = resolve("smollm2")
    with tempfile.TemporaryDirectory() as scratch, minicpm.load(path) as language_model:
        folder = Path(scratch) / "bf16"
        run_verb(["convert", str(path), str(folder), "--to", "llama", "--dtype", "bf16", "--no-verify"])
        engine = EngineModel("smollm2", language_model)
        rows = [speed(engine, folder, questions_of("hellaswag", options.data, 32 if options.quick else 160), rounds)]
        if options.equal:
            from minicpm.eval.torch_model import TorchModel

            exact = Path(scratch) / "fp32"
            run_verb(["convert", str(path), str(exact), "--to", "llama", "--dtype", "fp32", "--no-verify"])
            harness = Harness(exact, "float32", 8)
            for model in (TorchModel("torch fp32", exact, "fp32"), EngineModel("engine", language_model)):
                for task in EQUAL_TASKS:
                    asked = questions_of(task, options.data, options.equal)
                    print(equality(f"{model.name} {task}", model, harness, asked), flush=True)
    finish(rows, options)


if __name__ == "__main__":
    main()
