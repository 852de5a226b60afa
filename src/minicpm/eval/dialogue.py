"""Dialogues of two turns, each answer rated from 1 to 10 by another model, as in MT-Bench.

Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv:2306.05685; the judge's prompts
and the temperatures of the categories are FastChat's, `fastchat/llm_judge`. The prompts come with the questions' data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from minicpm.errors import EvalError
from minicpm.eval.contract import EvaluatedModel, Generation, Messages
from minicpm.eval.forms import Question
from minicpm.eval.judge import Sample, Sampling
from minicpm.eval.task import Form

_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
_NEEDS_REFERENCE = ("math", "reasoning", "coding")
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_TRIES = 3
_JUDGE_TOKENS = 2048


class Judge(Protocol):
    """Whoever rates; a `UrlModel` is one."""

    name: str

    def generate(self, prompts: Any, generation: Generation) -> list[str]:
        """Return the reply to each conversation."""
        ...


def judge_dialogues(
    model: EvaluatedModel, judge: Judge, questions: Mapping[int, Question], sampling: Sampling, form: Form
) -> Iterator[Sample]:
    """Yield the sample of each of `questions`: both answers, both judgements, both ratings, as they come.

    Raises:
        EvalError: the model has no chat template, the data holds no judge's prompts, or the judge gives no rating.
    """
    if not model.has_chat_template:
        raise EvalError(f"a dialogue needs a chat template, which {model.name} has not")
    for index, question in questions.items():
        facts = question.gold
        category = str(facts["category"]).removeprefix("zh_")
        generation = Generation(
            max_new_tokens=form.max_new_tokens,
            temperature=_TEMPERATURES.get(category, 0.0),
            top_p=1.0,
            seed=sampling.seed + index,
        )
        answers = _answer(model, facts["turns"], generation)
        ratings, texts = [], []
        for turn in range(len(answers)):
            text, rating = _rate(judge, facts, category, answers, turn)
            texts.append(text)
            ratings.append(rating)
        values = {f"score_turn_{turn + 1}": rating for turn, rating in enumerate(ratings)}
        values["score"] = sum(ratings) / len(ratings)
        yield Sample(index, values, {"category": facts["category"], "answers": answers, "judgements": texts})


def find_rating(text: str) -> float | None:
    """Return the last rating from 1 to 10 in double brackets; None without one."""
    ratings = [float(rating) for rating in _RATING.findall(text)]
    return ratings[-1] if ratings and 1 <= ratings[-1] <= 10 else None


def _answer(model: EvaluatedModel, turns: list[str], generation: Generation) -> list[str]:
    messages: list[dict[str, str]] = []
    answers = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        conversation: Messages = list(messages)
        answer = model.generate([conversation], generation)[0]
        messages.append({"role": "assistant", "content": answer})
        answers.append(answer)
    return answers


def _rate(judge: Judge, facts: Mapping[str, Any], category: str, answers: list[str], turn: int) -> tuple[str, float]:
    reference = facts["reference"] if category in _NEEDS_REFERENCE else None
    name = f"single{'-math' if reference else ''}-v1{'-multi-turn' if turn else ''}"
    prompts = facts["judge_prompts"]
    if name not in prompts:
        raise EvalError(
            f"the data holds no judge's prompt called {name!r}; it has {', '.join(sorted(prompts)) or 'none'}"
        )
    prompt = prompts[name]
    fields = {"question": facts["turns"][0], "answer": answers[0]}
    for number, (question, answer) in enumerate(zip(facts["turns"], answers, strict=True), 1):
        fields |= {f"question_{number}": question, f"answer_{number}": answer}
    for number, text in enumerate(reference or (), 1):
        fields[f"ref_answer_{number}"] = text
    messages = [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": _fill(prompt["prompt_template"], fields)},
    ]
    text = ""
    for attempt in range(_TRIES):
        text = judge.generate(
            [messages], Generation(_JUDGE_TOKENS, temperature=0.0 if attempt == 0 else 0.7, seed=attempt)
        )[0]
        rating = find_rating(text)
        if rating is not None:
            return text, rating
    raise EvalError(
        f"the judge {judge.name} gave no rating such as [[7]] in {_TRIES} answers, the last being {text[-200:]!r}; "
        "what was rated so far is kept: run it again with another judge model or server"
    )


def _fill(template: str, fields: Mapping[str, str]) -> str:
    # Not str.format: answers hold braces, and a field that the data lacks must be said, not guessed.
    def put(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise EvalError(f"the judge's prompt wants {match[0]}, which the question has not")
        return fields[match[1]]

    return re.sub(r"\{(\w+)\}", put, template)
