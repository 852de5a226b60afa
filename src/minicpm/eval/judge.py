"""Questions and a model -> one `Sample` per row: what was asked, what came, and every metric of it.

One function per mode, in one table. What this leaves out: dialogues (`dialogue.py`), files (`results.py`), and the
order of things (`runner.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minicpm.errors import EvalError
from minicpm.eval import code, statistics
from minicpm.eval.contract import EvaluatedModel, Generation
from minicpm.eval.forms import Question
from minicpm.eval.scorers import SCORERS
from minicpm.eval.statistics import Figure
from minicpm.eval.task import METRICS, Form


@dataclass(frozen=True)
class Sample:
    """One row's outcome.

    Attributes:
        index: of the row in the task.
        values: what the metrics are made of, by name.
        detail: what a person wants to see: choices' scores, the text and what was found in it.
    """

    index: int
    values: dict[str, float]
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How a protocol generates; the plain one is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None


def judge(form: Form, model: EvaluatedModel, questions: Mapping[int, Question], sampling: Sampling) -> list[Sample]:
    """Return the samples of `questions` (row index -> question), in their order."""
    return _JUDGES[form.mode](form, model, questions, sampling)


def _judge_choice(
    form: Form, model: EvaluatedModel, questions: Mapping[int, Question], sampling: Sampling
) -> list[Sample]:
    scores = iter(model.loglikelihood([pair for question in questions.values() for pair in question.pairs]))
    samples = []
    for index, question in questions.items():
        logprobs = [next(scores).logprob for _ in question.pairs]
        normed = [logprob / max(1, length) for logprob, length in zip(logprobs, question.lengths, strict=True)]
        best, best_normed = _argmax(logprobs), _argmax(normed)
        values = {"acc": float(best == question.gold), "acc_norm": float(best_normed == question.gold)}
        detail = {"gold": question.gold, "chosen": best, "chosen_norm": best_normed, "logprobs": logprobs}
        samples.append(Sample(index, values, detail))
    return samples


def _judge_cloze(
    form: Form, model: EvaluatedModel, questions: Mapping[int, Question], sampling: Sampling
) -> list[Sample]:
    scores = model.loglikelihood([question.pairs[0] for question in questions.values()])
    return [
        Sample(index, {"acc": float(score.is_greedy), "logprob": score.logprob}, {"continuation": question.pairs[0][1]})
        for (index, question), score in zip(questions.items(), scores, strict=True)
    ]


def _judge_perplexity(
    form: Form, model: EvaluatedModel, questions: Mapping[int, Question], sampling: Sampling
) -> list[Sample]:
    scores = model.rolling_loglikelihood([question.pairs[0][1] for question in questions.values()])
    samples = []
    for (index, question), score in zip(questions.items(), scores, strict=True):
        words = len(re.split(r"\s+", question.counted))
        values = {"logprob": score.logprob, "words": float(words), "bytes": float(len(question.counted.encode()))}
        samples.append(Sample(index, values, {"num_tokens": score.num_tokens}))
    return samples


def _judge_generate(
    form: Form, model: EvaluatedModel, questions: Mapping[int, Question], sampling: Sampling
) -> list[Sample]:
    generation = Generation(
        max_new_tokens=sampling.max_new_tokens or form.max_new_tokens,
        stop=form.stop,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    if form.is_chat and not model.has_chat_template:
        raise EvalError(
            f"form {form.name!r} is a conversation, and {model.name} has no chat template; use another form"
        )
    prompts: Sequence[Any] = [question.prompt for question in questions.values()]
    if form.is_chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = model.generate(prompts, generation)
    samples = []
    for (index, question), text in zip(questions.items(), texts, strict=True):
        is_right, reason = _is_right(form, text, question.gold)
        detail = {"text": text, "gold": question.gold} | ({"reason": reason} if reason else {})
        samples.append(Sample(index, {"acc": float(is_right)}, detail))
    return samples


def _is_right(form: Form, text: str, gold: Any) -> tuple[bool, str]:
    scorer = SCORERS[form.scorer]
    if scorer is not None:
        return scorer(text, gold), ""
    verdict = code.run_program(code.build_program(text, gold))
    return verdict.has_passed, verdict.reason


_JUDGES: Mapping[str, Callable[[Form, EvaluatedModel, Mapping[int, Question], Sampling], list[Sample]]] = {
    "choice": _judge_choice,
    "cloze": _judge_cloze,
    "perplexity": _judge_perplexity,
    "generate": _judge_generate,
}


def figures(form: Form, samples: Sequence[Sample]) -> list[Figure]:
    """Return the form's metrics over `samples`, the one it is known by first."""
    by_name = {name: _figure(name, samples) for name in METRICS[form.mode] if _has(name, samples)}
    return sorted(by_name.values(), key=lambda figure: figure.metric != form.known_by)


def _has(metric: str, samples: Sequence[Sample]) -> bool:
    return metric.endswith(("perplexity", "byte")) or metric in samples[0].values


def _figure(metric: str, samples: Sequence[Sample]) -> Figure:
    # A perplexity is a ratio of two sums: the second one is counted in these.
    weights = {"perplexity": None, "word_perplexity": "words", "byte_perplexity": "bytes", "bits_per_byte": "bytes"}
    if metric not in weights:
        return statistics.mean(metric, [sample.values[metric] for sample in samples])
    unit = weights[metric]
    return statistics.perplexity(
        metric,
        [sample.values["logprob"] for sample in samples],
        [sample.values[unit] if unit else 1.0 for sample in samples],
        is_bits=metric.startswith("bits"),
    )


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
