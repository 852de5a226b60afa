"""What an engine tells of its work: an `Event` for each token, and its `Load`."""

from __future__ import annotations

from dataclasses import dataclass

from minicpm.engine.sequence import Sequence, TokenLogprob
from minicpm.engine.stopping import FinishReason


@dataclass(frozen=True, slots=True)
class Event:
    """What a step brought for one sequence: a token with the text that it made certain, the end, or both."""

    sequence: Sequence
    token_id: int | None = None
    text: str = ""
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is; blocks are those of the KV cache, and tokens and steps count from its start."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_blocks: int
    num_held_blocks: int
    num_kept_blocks: int
    num_steps: int
    num_computed_tokens: int
    num_preemptions: int
    num_drafted_tokens: int
    num_accepted_tokens: int
