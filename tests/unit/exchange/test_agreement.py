"""Divergence by hand, and the lower bound where one side tells only its likeliest tokens."""

import numpy as np
import pytest

from minicpm.errors import DataError
from minicpm.exchange.agreement import Scores, agreement

P = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
Q = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.7, 0.2]], np.float32))


def test_whole_distributions_by_hand() -> None:
    result = agreement(Scores(P), Scores(Q))
    first = 0.5 * np.log(2) - 0.25 * np.log(2)
    second = 0.8 * np.log(8 / 7) + 0.1 * np.log(0.5)
    assert result.mean_kl == pytest.approx((first + second) / 2, rel=1e-5)
    assert result.max_kl == pytest.approx(first, rel=1e-5)
    assert result.top1 == 0.5
    assert result.max_delta_logprob == pytest.approx(np.log(2), rel=1e-5)
    assert not result.is_lower_bound


def test_a_model_agrees_with_itself() -> None:
    result = agreement(Scores(P), Scores(P))
    assert (result.mean_kl, result.max_kl, result.top1, result.max_delta_logprob) == (0, 0, 1, 0)


def test_partial_scores_give_a_lower_bound() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 50)).astype(np.float32)
    p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    logits = logits + rng.normal(size=logits.shape).astype(np.float32) * 0.3
    q = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-q, axis=1)[:, :10]
    partial = Scores(np.take_along_axis(q, order, 1), order)
    whole, bound = agreement(Scores(p), Scores(q)), agreement(Scores(p), partial)
    assert bound.is_lower_bound
    assert 0 < bound.mean_kl <= whole.mean_kl
    assert bound.mean_kl > 0.3 * whole.mean_kl
    assert bound.top1 == whole.top1
    swapped = agreement(partial, Scores(p))
    assert swapped.mean_kl > 0


def test_tokens_that_only_one_side_tells_fall_into_the_rest() -> None:
    a = Scores(np.log(np.array([[0.6, 0.3]], np.float32)), np.array([[5, 7]]))
    b = Scores(np.log(np.array([[0.6, 0.2]], np.float32)), np.array([[5, 9]]))
    result = agreement(a, b)
    assert result.mean_kl == pytest.approx(0, abs=1e-6)
    assert result.top1 == 1


def test_different_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="2 positions with 1"):
        agreement(Scores(P), Scores(P[:1]))
    with pytest.raises(DataError, match="vocabulary of 3 tokens with one of 2"):
        agreement(Scores(P), Scores(P[:, :2]))


def test_positions_that_one_side_is_silent_about_are_left_out() -> None:
    silent = np.array(P)
    silent[0] = -np.inf
    result = agreement(Scores(silent), Scores(Q))
    assert result.num_positions == 1
    assert result.top1 == 1
    with pytest.raises(DataError, match="no position"):
        agreement(Scores(np.full_like(P, -np.inf)), Scores(Q))
