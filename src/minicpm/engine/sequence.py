"""What is asked of the engine (`Request`) and how far it has come (`Sequence`).

Left out: which sequence runs when (`scheduler.py`) and how a token is chosen (`sampling.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Items
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from minicpm.engine.cache import Digest, chain_digest
from minicpm.engine.sampling import Occurrences, Sampler
from minicpm.engine.speculation_ngram import Lookup
from minicpm.engine.stopping import Ending, FinishReason
from minicpm.errors import EngineError, MiniCPMError

Floats: TypeAlias = npt.NDArray[np.float32]
Pooling = Literal["mean", "last"]
Speculation = Literal["ngram", "draft", "off"]


class ContextLengthError(EngineError):
    """A prompt is longer than the context."""


class Constraint(Protocol):
    """The language that one reply must belong to, and how much of it has come."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """The tokens that may come next, one truth value per id of the tokenizer; at least one is true.

        Raises:
            EngineError: that takes too long to find out; the reply fails.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Go on to the state after an allowed token that is no end token; whether the reply is complete then."""
        ...


@dataclass(frozen=True)
class Request:
    """One prompt and what is wanted of it; an engine checks it against its context and vocabulary.

    Attributes:
        prompt: token ids, bos included.
        sampler: how each token is chosen.
        max_new_tokens: the limit; None is what the context holds. 0 only reads the prompt.
        end_ids: tokens that end the reply.
        stop: texts that end the reply before them.
        logprobs: None, or how many of the likeliest tokens to tell at each new token, beside the chosen one.
        prompt_logprobs: the same for each token of the prompt but the first.
        first_scored: the index in the prompt from which `prompt_logprobs` tells; tokens well before it may come from
            the cache.
        wants_distribution: whether the log-probabilities (V,) after the prompt are kept.
        pooling: None, or how the final hidden states of the prompt become one vector; nothing is generated then.
        speculate: where drafts of the next tokens come from, which change the pace and nothing else; None is the
            engine's choice: its draft model, if it has one, else "ngram".
        constraint: makes what restricts the tokens of one reply; None lets every token come.
    """

    prompt: Items[int]
    sampler: Sampler = field(default_factory=Sampler)
    max_new_tokens: int | None = None
    end_ids: AbstractSet[int] = frozenset()
    stop: Items[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    first_scored: int = 0
    wants_distribution: bool = False
    pooling: Pooling | None = None
    speculate: Speculation | None = None
    constraint: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise EngineError("the prompt has no tokens; at least one is needed")
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise EngineError(f"max_new_tokens must be at least 0, got {self.max_new_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count < 0:
                raise EngineError(f"{name} must be at least 0 or None, got {count}")
        if self.speculate is not None and self.speculate not in get_args(Speculation):
            known = ", ".join(get_args(Speculation))
            raise EngineError(f"speculate must be one of {known}, got {self.speculate!r}")
        if not 0 <= self.first_scored < len(self.prompt):
            raise EngineError(
                f"first_scored must lie in the prompt of {len(self.prompt)} tokens, got {self.first_scored}"
            )
        if self.pooling is not None and (self.max_new_tokens or self.prompt_logprobs is not None):
            raise EngineError("pooled hidden states and generated or scored tokens need two requests")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its text alone, and its log-probability in the model's own distribution (None at the very first).

    `top` are the likeliest tokens at its place, likeliest first; their own `top` is empty.
    """

    token: str
    token_id: int
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


class Owner(NamedTuple):
    """Whom a sequence counts for, so that each gets its turn: a client, and one of its requests."""

    client: Hashable = None
    request: Hashable = None


@dataclass
class Timings:
    """Moments of one request, in seconds of `time.perf_counter`; None while they have not come."""

    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None


class Sequence:
    """The state of one request: its tokens, how many of them are in the cache, where, and what came out.

    Only the engine writes to it. `token_ids` are prompt and reply; everything else that can be derived is.
    """

    def __init__(
        self, request: Request, owner: Owner | None = None, *, ending: Ending, max_new_tokens: int, vocab_size: int
    ) -> None:
        self.request = request
        self.owner = owner or Owner()
        self.ending = ending
        self.max_new_tokens = max_new_tokens
        self.generator = request.sampler.generator()
        self.occurrences = Occurrences(vocab_size, request.prompt) if request.sampler.has_penalties else None
        self.constraint = request.constraint() if request.constraint else None
        self.token_ids = list(request.prompt)
        self.num_prompt_tokens = len(self.token_ids)
        self.pieces: list[str] = []
        self.finish_reason: FinishReason | None = None
        # Why it is "failed"; the others of the same step go on.
        self.error: MiniCPMError | None = None
        # Positions whose keys and values are in the cache, and the blocks that hold them.
        self.num_computed = 0
        self.blocks: list[int] = []
        self.slot = -1
        self.digests: list[Digest] = []
        self.num_published = 0
        # Positions whose output was used up, for requests that want the output of every position.
        self.num_read = max(0, request.first_scored - 1)
        # Leading blocks that stand in the engine's block table.
        self.num_tabled = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        # What foresees the next tokens, how many of its drafts were computed, and how many of those were right.
        self.lookup = Lookup()
        self.num_drafted_tokens = self.num_accepted_tokens = 0
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.distribution: Floats | None = None
        self.pooled: npt.NDArray[np.float64] | None = None
        self.timings = Timings()

    @property
    def num_pending(self) -> int:
        """How many tokens are to be computed yet."""
        return len(self.token_ids) - self.is_only_scored - self.num_computed

    @property
    def is_only_scored(self) -> bool:
        """Whether nothing is wanted but the prompt's log-probabilities, so that its last token need not be computed."""
        request = self.request
        is_scored = request.prompt_logprobs is not None and not request.wants_distribution
        return is_scored and self.max_new_tokens == 0 and self.num_prompt_tokens > 1

    @property
    def new_ids(self) -> list[int]:
        """The ids of the reply so far, the end token included."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_left(self) -> int:
        """How many more tokens the reply may have."""
        return self.max_new_tokens - (len(self.token_ids) - self.num_prompt_tokens)

    @property
    def text(self) -> str:
        """The text of the reply so far."""
        return "".join(self.pieces)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    @property
    def wants_hidden(self) -> bool:
        """Whether hidden states are wanted instead of logits."""
        return self.request.pooling is not None

    @property
    def reads_every_row(self) -> bool:
        """Whether the output of every position of the prompt is wanted, so that none may come from the cache unread."""
        return self.request.prompt_logprobs is not None or self.request.pooling == "mean"

    @property
    def num_reusable(self) -> int:
        """How many leading tokens may be taken from the cache: the last must be computed, as its output is wanted."""
        last = len(self.token_ids) - 1
        return min(last, self.num_read) if self.reads_every_row else last

    def num_blocks(self, num_tokens: int, block_tokens: int) -> int:
        """How many more blocks the first `num_tokens` positions need."""
        return -(-num_tokens // block_tokens) - len(self.blocks)

    def digest(self, index: int, block_tokens: int) -> Digest:
        """The digest of the full block `index`."""
        while len(self.digests) <= index:
            start = len(self.digests) * block_tokens
            previous = self.digests[-1] if self.digests else b""
            self.digests.append(chain_digest(previous, self.token_ids[start : start + block_tokens]))
        return self.digests[index]

    def count_cached(self, num_tokens: int) -> None:
        """Note that the next `num_tokens` are in the cache without having been computed for it."""
        self.num_computed += num_tokens
        # What a preempted sequence finds again is its own.
        self.num_cached_tokens += 0 if self.num_preemptions else num_tokens


def count_new_tokens(request: Request, context_length: int, vocab_size: int) -> int:
    """Return how many new tokens `request` may have in a context of `context_length` and a vocabulary of `vocab_size`.

    Raises:
        EngineError: it does not fit them.
    """
    num_prompt = len(request.prompt)
    wants_reply = request.pooling is None and request.max_new_tokens != 0
    if num_prompt + wants_reply > context_length:
        room = " and leaves no room for a reply" if num_prompt == context_length else ""
        raise ContextLengthError(
            f"the prompt has {num_prompt} tokens{room}; the context holds {context_length}: shorten the prompt, or "
            "load the model with a longer context_length"
        )
    ids = np.asarray(request.prompt)
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size:
        raise EngineError(f"the prompt has ids outside the vocabulary of {vocab_size} tokens")
    if any(token_id >= vocab_size for token_id in request.sampler.logit_bias):
        raise EngineError(f"logit_bias names an id outside the vocabulary of {vocab_size} tokens")
    if not wants_reply:
        return 0
    room_tokens = context_length - num_prompt
    return room_tokens if request.max_new_tokens is None else min(request.max_new_tokens, room_tokens)
