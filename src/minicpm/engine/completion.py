"""`Completion`: what came of one prompt, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from minicpm.engine.sequence import Sequence, TokenLogprob
from minicpm.engine.stopping import FinishReason


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply or continuation, finished or as far as it has come.

    Attributes:
        text: without end tokens and stop texts.
        token_ids: every token that was chosen, a last end token included.
        finish_reason: "stop" (end token or stop text), "length" (a limit of tokens), "cancelled", "failed", or None:
            unfinished.
        num_prompt_tokens: tokens of the prompt, bos and template included.
        num_cached_tokens: how many of those were taken from the cache instead of computed.
        num_drafted_tokens: tokens of the reply that were guessed and computed ahead.
        num_accepted_tokens: how many of those came true.
        logprobs: one record per token where they were asked for, else None.
        queue_seconds: from the request to the first step that computed something for it.
        first_token_seconds: from the request to the first token; None if there is none.
        seconds: from the request to the end; None while unfinished.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    logprobs: list[TokenLogprob] | None
    queue_seconds: float | None
    first_token_seconds: float | None
    seconds: float | None

    @property
    def num_new_tokens(self) -> int:
        """How many tokens were chosen."""
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float | None:
        """The pace after the first token; None with fewer than two tokens."""
        if self.seconds is None or self.first_token_seconds is None or self.num_new_tokens < 2:
            return None
        return (self.num_new_tokens - 1) / max(self.seconds - self.first_token_seconds, 1e-9)


def describe(sequence: Sequence) -> Completion:
    """Return what came of `sequence` so far."""
    timings = sequence.timings

    def since_arrival(moment: float | None) -> float | None:
        return None if moment is None else moment - timings.arrived

    return Completion(
        text=sequence.text,
        token_ids=sequence.new_ids,
        finish_reason=sequence.finish_reason,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_cached_tokens=sequence.num_cached_tokens,
        num_drafted_tokens=sequence.num_drafted_tokens,
        num_accepted_tokens=sequence.num_accepted_tokens,
        logprobs=None if sequence.request.logprobs is None else list(sequence.logprobs),
        queue_seconds=since_arrival(timings.started),
        first_token_seconds=since_arrival(timings.first_token),
        seconds=since_arrival(timings.finished),
    )
