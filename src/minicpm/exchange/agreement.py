"""How far two models agree on the next token, position by position: numbers only, no models.

A model may tell its whole distribution or only its likeliest tokens (a server does that). Where one side is partial,
the divergence counts the tokens it names and the rest as one outcome, which never exceeds the true divergence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minicpm.errors import DataError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the next token at T positions.

    `logprobs` is (T, V) when `ids` is None; otherwise (T, k) for the tokens `ids` (T, k), likeliest first, −inf where a
    row names fewer. A row without any number is a position that the model told nothing about.
    """

    logprobs: Floats
    ids: Ints | None = None

    @property
    def best(self) -> Ints:
        """The likeliest token at each position, (T,)."""
        column = self.logprobs.argmax(axis=1)
        return column if self.ids is None else np.take_along_axis(self.ids, column[:, None], axis=1)[:, 0]

    def rows(self, wanted: npt.NDArray[np.bool_]) -> Scores:
        """Return the positions where `wanted` (T,) is true."""
        return Scores(self.logprobs[wanted], None if self.ids is None else self.ids[wanted])

    def at(self, ids: Ints) -> Floats:
        """Return the log-probabilities of tokens `ids` (T, k), −inf where this side does not tell them."""
        if self.ids is None:
            return np.take_along_axis(self.logprobs, ids, axis=1)
        found = np.full(ids.shape, -np.inf, np.float32)
        for row, (wanted, known, values) in enumerate(zip(ids, self.ids, self.logprobs, strict=True)):
            table = dict(zip(known.tolist(), values.tolist(), strict=True))
            found[row] = [table.get(token, -np.inf) for token in wanted.tolist()]
        return found


@dataclass(frozen=True)
class Agreement:
    """How B differs from A over the compared positions; divergences are KL(A ‖ B) in nats."""

    num_positions: int
    mean_kl: float
    max_kl: float
    top1: float
    max_delta_logprob: float
    is_lower_bound: bool

    def describe(self) -> str:
        """Return one line for people."""
        bound = "≥ " if self.is_lower_bound else ""
        return (
            f"KL mean {bound}{self.mean_kl:.2e}, max {bound}{self.max_kl:.2e} nats; top-1 agrees on {self.top1:.2%} of "
            f"{self.num_positions} positions; max |Δlogprob| {self.max_delta_logprob:.2e}"
        )


def agreement(a: Scores, b: Scores) -> Agreement:
    """Return how `b` differs from `a`; both score the same positions of the same text.

    `max_delta_logprob` is taken over tokens that A gives at least 1e-4, where both sides tell them: the rest of a
    distribution has logarithms that no use of the model sees.

    Raises:
        DataError: a different number of positions or, where both are whole, of tokens.
    """
    if len(a.logprobs) != len(b.logprobs):
        raise DataError(f"cannot compare {len(a.logprobs)} positions with {len(b.logprobs)}")
    is_told = np.isfinite(a.logprobs.max(axis=1)) & np.isfinite(b.logprobs.max(axis=1))
    if not is_told.any():
        raise DataError("there is no position that both models tell anything about")
    a, b = a.rows(is_told), b.rows(is_told)
    is_whole = a.ids is None and b.ids is None
    if is_whole and a.logprobs.shape != b.logprobs.shape:
        raise DataError(
            f"cannot compare a vocabulary of {a.logprobs.shape[1]} tokens with one of {b.logprobs.shape[1]}"
        )
    if is_whole:
        p, q = a.logprobs.astype(np.float64), b.logprobs.astype(np.float64)
    else:
        p, q = _shared(a, b)
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isfinite(p) & (p > -60), np.exp(p) * (p - q), 0.0)
    kl = np.maximum(terms.sum(axis=1), 0.0)
    with np.errstate(invalid="ignore"):
        likely = (p >= np.log(1e-4)) & np.isfinite(q)
        delta = np.abs(np.where(likely, p - q, 0.0))
    return Agreement(
        num_positions=len(kl),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1=float((a.best == b.best).mean()),
        max_delta_logprob=float(delta.max()),
        is_lower_bound=not is_whole,
    )


def _shared(a: Scores, b: Scores) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return both distributions over the tokens that both sides tell, and the rest as one last outcome."""
    ids = b.ids if b.ids is not None else a.ids
    assert ids is not None
    p, q = a.at(ids).astype(np.float64), b.at(ids).astype(np.float64)
    is_shared = np.isfinite(p) & np.isfinite(q)
    p, q = np.where(is_shared, p, -np.inf), np.where(is_shared, q, -np.inf)
    # Rounded log-probabilities may sum to a little more than 1; the floor keeps the rest a probability.
    rest_p = np.log(np.maximum(1.0 - np.exp(p).sum(axis=1, keepdims=True), 1e-9))
    rest_q = np.log(np.maximum(1.0 - np.exp(q).sum(axis=1, keepdims=True), 1e-9))
    return np.hstack([p, rest_p]), np.hstack([q, rest_q])
