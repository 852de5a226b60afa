"""How far our scores are from lm-evaluation-harness's `hf` backend in fp32, row by row; what `bench/eval.py` prints.

The bounds: log-likelihoods of our torch model within 1e-2 and the same choices; of the engine within 0.1 sqrt(n / 30)
for n tokens on average and as many right choices within 2 rows of 200.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minicpm.eval.contract import EvaluatedModel, Scored
from minicpm.eval.forms import FormReader, Question
from minicpm.eval.rows import read_task
from minicpm.eval.task import load_task

TASKS = ("arc_easy", "hellaswag", "piqa", "winogrande", "lambada")
TORCH_GAP, ENGINE_ROWS_OF_200 = 1e-2, 2

Theirs = Sequence[tuple[float, bool]]


class Harness:
    """The `hf` backend of lm-evaluation-harness."""

    def __init__(self, folder: Path, dtype: str, batch_size: int) -> None:
        from lm_eval.models.huggingface import HFLM

        self.model = HFLM(pretrained=str(folder), dtype=dtype, device="cpu", batch_size=batch_size)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> Theirs:
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


@dataclass(frozen=True)
class Equality:
    """One model on one task: right rows of both, rows that differ, gaps of log-likelihoods, share of the bound."""

    model: str
    task: str
    num_rows: int
    ours_right: int
    theirs_right: int
    num_differing: int
    mean_gap: float
    largest_gap: float
    share: float

    @property
    def holds(self) -> bool:
        """Whether it is within the bounds of its backend."""
        if self.model.startswith("torch"):
            return self.largest_gap <= TORCH_GAP and self.ours_right == self.theirs_right
        rows = ENGINE_ROWS_OF_200 * max(self.num_rows, 200) / 200
        return self.share <= 1 and abs(self.ours_right - self.theirs_right) <= rows

    def __str__(self) -> str:
        right = f"right {self.ours_right}, hf {self.theirs_right}, differing {self.num_differing}"
        gaps = f"gap of log-likelihoods mean {self.mean_gap:.1e}, largest {self.largest_gap:.1e}"
        verdict = f"{self.share:.3f} of the engine's bound: {'holds' if self.holds else 'FALLS SHORT'}"
        return f"{self.model} {self.task}: {self.num_rows} rows, {right}; {gaps}, {verdict}"


def equality(name: str, task: str, model: EvaluatedModel, theirs: Theirs, questions: Sequence[Question]) -> Equality:
    """Compare the scores of `model` with the harness's of the same questions."""
    ours: list[Scored] = model.loglikelihood(pairs_of(questions))
    gaps = [abs(o.logprob - t[0]) for o, t in zip(ours, theirs, strict=True)]
    bounds = [0.1 * math.sqrt(o.num_tokens / 30) for o in ours]
    mine = _right(questions, [o.logprob for o in ours], [o.is_greedy for o in ours])
    peer = _right(questions, [t[0] for t in theirs], [t[1] for t in theirs])
    share = statistics.mean(gap / bound for gap, bound in zip(gaps, bounds, strict=True))
    differing = sum(a != b for a, b in zip(mine, peer, strict=True))
    return Equality(
        name, task, len(questions), sum(mine), sum(peer), differing, statistics.mean(gaps), max(gaps), share
    )


def _right(questions: Sequence[Question], logprobs: Sequence[float], greedy: Sequence[bool]) -> list[bool]:
    """Which rows are right: the likeliest choice is, or the one continuation is what greedy decoding says."""
    found, start = [], 0
    for question in questions:
        stop = start + len(question.pairs)
        best = max(range(start, stop), key=logprobs.__getitem__) - start
        found.append(greedy[start] if len(question.pairs) == 1 else best == question.gold)
        start = stop
    return found


def write_tiny_model(smollm2: Path, folder: Path) -> None:
    """Write random wide weights of four small layers with SmolLM2's vocabulary, so that logits spread over it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=96, intermediate_size=160, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2, initializer_range=0.15,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in smollm2.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "chat_template")):
            shutil.copyfile(file, folder / file.name)


def print_equalities(
    folder: Path,
    models: Sequence[tuple[str, Callable[[], EvaluatedModel]]],
    tasks: Sequence[str],
    data: Path,
    count: int,
) -> None:
    """Print how far each of `models` is from the `hf` backend in fp32 on the folder, task by task."""
    harness = Harness(folder, "float32", 8)
    opened = [(name, make()) for name, make in models]
    for task in tasks:
        asked = questions_of(task, data, count)
        theirs = harness.loglikelihood(pairs_of(asked))
        for name, model in opened:
            print(equality(name, task, model, theirs, asked), flush=True)
