"""What a task may ask of a model, whatever runs it.

Source: the contract of EleutherAI/lm-evaluation-harness, `lm_eval/api/model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Scored:
    """A continuation after its context.

    Attributes:
        logprob: natural logarithm of its probability, summed over its tokens.
        num_tokens: how many tokens it has.
        is_greedy: whether each of them was the likeliest at its place.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Generation:
    """How a text is to be generated; `temperature` 0 is greedy, `seed` makes sampling repeatable."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


Messages = Sequence[dict[str, str]]


class EvaluatedModel(Protocol):
    """A model under evaluation. `name` says which, `runtime` what computes it, in what precision."""

    name: str
    runtime: str
    has_chat_template: bool

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Return the score of each continuation after its context; a context that is too long loses its beginning."""
        ...

    def rolling_loglikelihood(self, texts: Sequence[str]) -> list[Scored]:
        """Return the score of each whole text, read in windows as long as the context."""
        ...

    def generate(self, prompts: Sequence[str | Messages], generation: Generation) -> list[str]:
        """Return the continuation of each text, or the reply to each conversation."""
        ...
