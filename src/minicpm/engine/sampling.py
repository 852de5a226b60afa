"""The choice of the next token from logits.

The order is fixed, and that of transformers and vLLM where those agree:

1. `logit_bias` is added.
2. Penalties: `repetition_penalty` divides positive and multiplies negative logits of every token of prompt and reply;
   then `presence_penalty` once, and `frequency_penalty` once per occurrence, are subtracted for tokens of the reply.
3. `temperature` 0 takes the largest logit (the smaller id of two equal ones) and the rest is skipped; else it divides.
4. `top_k`, then `top_p` on what is left, then `min_p` relative to the likeliest token.
5. One uniform number of the sequence's own generator chooses, so what else runs beside a request changes nothing.

Log-probabilities (`log_softmax`, `top_tokens`) are those of the model's own distribution, before all of this.
Left out: when to stop (`stopping.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minicpm.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from random import Random

Floats: TypeAlias = npt.NDArray[np.float32]
Ids: TypeAlias = npt.NDArray[np.intp]

_GROUP_SIZE = 64
# The first is enough for the nucleus of nearly every distribution; beyond the last, everything is sorted.
_NUCLEUS_SIZES = (256, 4096)


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen; the defaults are the model's plain distribution.

    Attributes:
        temperature: what logits are divided by; 0 is greedy.
        top_k: how many of the likeliest tokens stay; 0 is all.
        top_p: the smallest set of likeliest tokens with at least this probability stays.
        min_p: tokens below this times the likeliest one's probability go.
        repetition_penalty: 1 is off; above 1 makes what occurred rarer.
        presence_penalty: subtracted from logits of tokens that the reply holds.
        frequency_penalty: subtracted for each time that the reply holds the token.
        logit_bias: token id → what is added to its logit.
        seed: the same seed makes the same choices; None draws one.

    Raises:
        ConfigError: a value that is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, math.inf, "a finite number of at least 0 (0 is greedy)")
        _check("top_p", self.top_p, 0.0, 1.0, "a number from 0 to 1")
        _check("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1")
        _check("repetition_penalty", self.repetition_penalty, 1e-6, math.inf, "a number above 0 (1 is off)")
        _check("presence_penalty", self.presence_penalty, -math.inf, math.inf, "a finite number")
        _check("frequency_penalty", self.frequency_penalty, -math.inf, math.inf, "a finite number")
        if not _is_whole(self.top_k) or self.top_k < 0:
            raise ConfigError(f"top_k must be a whole number of at least 0 (0 is all), got {self.top_k!r}")
        if self.seed is not None and not _is_whole(self.seed):
            raise ConfigError(f"seed must be a whole number or None, got {self.seed!r}")
        for token_id, bias in self.logit_bias.items():
            if not _is_whole(token_id) or token_id < 0:
                raise ConfigError(f"logit_bias takes token ids, got {token_id!r}")
            _check(f"logit_bias[{token_id}]", bias, -math.inf, math.inf, "a finite number")

    @property
    def is_greedy(self) -> bool:
        """Whether the largest logit is taken."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on what occurred before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def generator(self) -> Random:
        """A generator for one sequence. Python promises that a seed gives the same numbers in every version."""
        from random import Random

        return Random() if self.seed is None else Random(f"minicpm {self.seed}")


class Occurrences:
    """How often each token stands in a prompt and in its reply; kept only for samplers with penalties."""

    def __init__(self, vocab_size: int, prompt: Sequence[int]) -> None:
        self.in_prompt = np.zeros(vocab_size, np.bool_)
        self.in_prompt[np.asarray(prompt, np.intp)] = True
        self.in_reply = np.zeros(vocab_size, np.float32)

    def add(self, token_id: int) -> None:
        """Count one token of the reply."""
        self.in_reply[token_id] += 1


def choose_token(logits: Floats, sampler: Sampler, occurrences: Occurrences | None, generator: Random) -> int:
    """Return the next token after logits (V,), which are left as they are.

    Raises:
        EngineError: the logits are not numbers.
    """
    ids, weights = candidates(logits, sampler, occurrences)
    if ids is not None and len(ids) == 1:
        return int(ids[0])
    place = _place(weights, generator.random())
    return place if ids is None else int(ids[place])


def candidates(
    logits: Floats, sampler: Sampler, occurrences: Occurrences | None = None
) -> tuple[Ids | None, npt.NDArray[Any]]:
    """Return the tokens that may come after logits (V,), None for all of them, and the weight of each.

    The weights are in proportion to the probabilities of the choice; they need not sum to 1.

    Raises:
        EngineError: the logits are not numbers.
    """
    if sampler.is_greedy and occurrences is None and (sole := _largest(logits, sampler.logit_bias)) is not None:
        return np.array([sole]), np.ones(1)
    logits = _adjust(logits, sampler, occurrences)
    best = logits.argmax()
    if not math.isfinite(logits[best]):
        raise EngineError(f"the model gives the logit {logits[best]} for token {best}; its weights are damaged")
    if sampler.is_greedy:
        return np.array([best]), np.ones(1)
    return _cut_down(logits, sampler, logits[best])


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities of logits (…, V), the sum in float64."""
    shifted: Floats = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    return shifted


def log_total(logits: Floats) -> float:
    """Return the logarithm of the sum of exp of logits (V,), the sum in float64; no array of V outlives it."""
    largest = logits.max()
    shifted = logits - largest
    np.exp(shifted, out=shifted)
    return float(largest) + math.log(shifted.sum(dtype=np.float64))


def top_tokens(values: Floats, count: int) -> Ids:
    """Return the ids of the `count` largest of `values` (V,), largest first, the smaller id first of two equal ones."""
    if count == 1:
        return np.array([values.argmax()])
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    num_groups, pool = len(values) // _GROUP_SIZE, values
    if count * 4 < num_groups:
        # At least `count` values reach the count-th largest of the groups' maxima, and few more do.
        pool = values[: num_groups * _GROUP_SIZE].reshape(num_groups, _GROUP_SIZE).max(axis=1)
    threshold = np.partition(pool, len(pool) - count)[len(pool) - count]
    ids = np.flatnonzero(values >= threshold)
    return ids[np.argsort(-values[ids], kind="stable")[:count]]


def _place(weights: npt.NDArray[Any], share: float) -> int:
    """Return where the running sum of `weights` passes `share` (below 1) of their sum; never a place of weight 0."""
    groups = np.add.reduceat(weights, np.arange(0, len(weights), _GROUP_SIZE), dtype=np.float64).cumsum()
    group = _passing(groups, share * groups[-1])
    first = group * _GROUP_SIZE
    sums = weights[first : first + _GROUP_SIZE].cumsum(dtype=np.float64)
    return first + _passing(sums, share * groups[-1] - (groups[group - 1] if group else 0.0))


def _passing(sums: npt.NDArray[np.float64], value: float) -> int:
    """Return the first of ascending `sums` above `value`; where rounding left none, the first of the largest."""
    return min(int(sums.searchsorted(value, side="right")), int(sums.searchsorted(sums[-1])))


def _largest(logits: Floats, bias: Mapping[int, float]) -> int | None:
    """Return the token with the largest biased logit, the smaller id of two; None where that needs biased logits."""
    best = int(logits.argmax())
    if best in bias:
        return None
    largest = logits[best]
    for token_id, addend in bias.items():
        value = logits[token_id] + addend
        if value > largest or (value == largest and token_id < best):
            best, largest = token_id, value
    return best if math.isfinite(largest) else None


def _adjust(logits: Floats, sampler: Sampler, occurrences: Occurrences | None) -> Floats:
    if not sampler.logit_bias and occurrences is None:
        return logits
    logits = logits.copy()
    for token_id, bias in sampler.logit_bias.items():
        logits[token_id] += bias
    if occurrences is None:
        return logits
    if sampler.repetition_penalty != 1:
        ids = np.flatnonzero(occurrences.in_prompt | (occurrences.in_reply > 0))
        seen, penalty = logits[ids], np.float32(sampler.repetition_penalty)
        logits[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
    if sampler.presence_penalty:
        logits -= np.float32(sampler.presence_penalty) * (occurrences.in_reply > 0)
    if sampler.frequency_penalty:
        logits -= np.float32(sampler.frequency_penalty) * occurrences.in_reply
    return logits


def _cut_down(logits: Floats, sampler: Sampler, peak: np.float32) -> tuple[Ids | None, npt.NDArray[Any]]:
    """Temperature, `top_k`, `top_p` and `min_p`."""
    with np.errstate(over="ignore", under="ignore"):
        if sampler.top_k and sampler.top_k < len(logits):
            ids = top_tokens(logits, sampler.top_k)
            weights = np.exp((logits[ids].astype(np.float64) - peak) / sampler.temperature)
            return _cut(ids, weights, sampler, sampler.top_p * weights.sum())
        weights = np.exp((logits - peak) / np.float32(max(sampler.temperature, 1e-30)))
    if sampler.top_p < 1:
        mass = sampler.top_p * weights.sum(dtype=np.float64)
        for count in (*_NUCLEUS_SIZES, len(logits)):
            ids = top_tokens(logits, count)
            if weights[ids].sum(dtype=np.float64) >= mass:
                break
        return _cut(ids, weights[ids], sampler, mass)
    if sampler.min_p:
        ids = np.flatnonzero(weights >= sampler.min_p)
        return ids, weights[ids]
    return None, weights


def _cut(ids: Ids, weights: npt.NDArray[Any], sampler: Sampler, mass: float) -> tuple[Ids, npt.NDArray[Any]]:
    """Apply `top_p` (as the weight `mass`) and `min_p` to tokens in descending order."""
    count = len(ids)
    if sampler.top_p < 1:
        count = min(count, int(weights.cumsum(dtype=np.float64).searchsorted(mass, side="left")) + 1)
    if sampler.min_p:
        count = min(count, int((weights >= sampler.min_p * weights[0]).sum()))
    return ids[:count], weights[:count]


def _check(name: str, value: Any, low: float, high: float, accepted: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} must be {accepted}, got {value!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
