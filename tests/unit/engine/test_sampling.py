"""The choice of a token: hand-worked tables, frequencies of many seeded draws, and the limits of every setting."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm.engine.sampling import (
    Occurrences,
    Sampler,
    _place,
    candidates,
    choose_token,
    log_softmax,
    top_tokens,
)
from minicpm.errors import ConfigError, EngineError

HALVES = np.log(np.array([0.125, 0.5, 0.25, 0.0625, 0.0625], np.float32))


def probabilities(logits: Any, sampler: Sampler, occurrences: Occurrences | None = None) -> dict[int, float]:
    """The distribution of the choice, as token -> probability."""
    ids, weights = candidates(np.asarray(logits, np.float32), sampler, occurrences)
    shares = weights / weights.sum()
    return {int(i): float(p) for i, p in zip(range(len(shares)) if ids is None else ids, shares, strict=True)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 1 / 8, 1: 1 / 2, 2: 1 / 4, 3: 1 / 16, 4: 1 / 16}),
        ({"temperature": 0}, {1: 1}),
        ({"temperature": 0, "top_k": 3, "top_p": 0.9, "min_p": 0.1}, {1: 1}),
        # Squared: 1/64, 1/4, 1/16, 1/256, 1/256, which sum to 86/256.
        ({"temperature": 0.5}, {0: 4 / 86, 1: 64 / 86, 2: 16 / 86, 3: 1 / 86, 4: 1 / 86}),
        ({"top_k": 1}, {1: 1}),
        ({"top_k": 2}, {1: 2 / 3, 2: 1 / 3}),
        # Of two equal ones the smaller id stays.
        ({"top_k": 4}, {0: 2 / 15, 1: 8 / 15, 2: 4 / 15, 3: 1 / 15}),
        ({"top_k": 99}, {0: 1 / 8, 1: 1 / 2, 2: 1 / 4, 3: 1 / 16, 4: 1 / 16}),
        ({"top_p": 0}, {1: 1}),
        ({"top_p": 0.4}, {1: 1}),
        ({"top_p": 0.6}, {1: 2 / 3, 2: 1 / 3}),
        ({"top_p": 0.8}, {0: 1 / 7, 1: 4 / 7, 2: 2 / 7}),
        ({"min_p": 0.2}, {0: 1 / 7, 1: 4 / 7, 2: 2 / 7}),
        ({"min_p": 0.3}, {1: 2 / 3, 2: 1 / 3}),
        ({"min_p": 1}, {1: 1}),
        # top_p is taken of what top_k left: 2/3 alone reaches 0.6.
        ({"top_k": 2, "top_p": 0.6}, {1: 1}),
        ({"top_k": 2, "top_p": 0.7}, {1: 2 / 3, 2: 1 / 3}),
        # The temperature comes first: at 0.5 the likeliest has 64/86 = 0.74.
        ({"temperature": 0.5, "top_p": 0.74}, {1: 1}),
        ({"temperature": 2.0, "top_p": 0.74}, {0: 0.22654, 1: 0.45308, 2: 0.32038}),
        ({"top_p": 0.8, "min_p": 0.3}, {1: 2 / 3, 2: 1 / 3}),
        ({"logit_bias": {3: math.log(8)}, "top_k": 2}, {1: 1 / 2, 3: 1 / 2}),
        ({"logit_bias": {1: -100}, "temperature": 0}, {2: 1}),
    ],
    ids=str,
)
def test_hand_worked_distributions(settings: dict[str, Any], expected: dict[int, float]) -> None:
    assert probabilities(HALVES, Sampler(**settings)) == pytest.approx(expected, abs=2e-5)


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_reply() -> None:
    occurrences = Occurrences(4, prompt=[0, 0])
    occurrences.add(3)
    found = probabilities([2.0, 2.0, -2.0, -2.0], Sampler(repetition_penalty=2.0), occurrences)
    expected = np.exp([1.0, 2.0, -2.0, -4.0])
    assert list(found.values()) == pytest.approx(expected / expected.sum(), rel=1e-5)


def test_presence_and_frequency_penalties_look_at_the_reply_only() -> None:
    occurrences = Occurrences(4, prompt=[0, 0, 1])
    for token_id in (1, 2, 2, 2):
        occurrences.add(token_id)
    sampler = Sampler(presence_penalty=0.5, frequency_penalty=0.25)
    found = probabilities([1.0, 1.0, 1.0, 1.0], sampler, occurrences)
    expected = np.exp([1.0, 0.25, -0.25, 1.0])
    assert list(found.values()) == pytest.approx(expected / expected.sum(), rel=1e-5)


def test_a_bias_comes_before_the_repetition_penalty() -> None:
    found = probabilities([-1.0, 0.0], Sampler(logit_bias={0: 3.0}, repetition_penalty=2.0), Occurrences(2, [0]))
    expected = np.exp([1.0, 0.0])
    assert list(found.values()) == pytest.approx(expected / expected.sum(), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 4, "top_p": 0.9}]
)
def test_frequencies_of_many_draws(settings: dict[str, Any]) -> None:
    sampler, num_draws = Sampler(**settings, seed=3), 20_000
    generator = sampler.generator()
    drawn = np.bincount([choose_token(HALVES, sampler, None, generator) for _ in range(num_draws)], minlength=5)
    for token_id in range(5):
        p = probabilities(HALVES, sampler).get(token_id, 0.0)
        # Five standard deviations; a token that was cut must never come.
        assert abs(drawn[token_id] - num_draws * p) <= 5 * math.sqrt(num_draws * p * (1 - p))


def test_a_seed_is_a_series_and_logits_stay_as_they_are() -> None:
    logits = np.random.default_rng(0).normal(0, 2, 1000).astype(np.float32)
    before = logits.copy()

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(seed=seed, repetition_penalty=1.1, logit_bias={5: 1.0})
        generator, occurrences = sampler.generator(), Occurrences(1000, [1, 2])
        return [choose_token(logits, sampler, occurrences, generator) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(-7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)
    assert (logits == before).all()


def test_a_flat_distribution_needs_more_than_the_first_candidates() -> None:
    found = probabilities(np.zeros(5000), Sampler(top_p=0.9))
    assert sorted(found) == list(range(4500))


def test_extreme_temperatures_are_numbers() -> None:
    logits = [1.0, 0.5, -3e38, 3e38]
    assert probabilities(logits, Sampler(temperature=1e-300)) == pytest.approx({0: 0, 1: 0, 2: 0, 3: 1})
    assert probabilities(logits, Sampler(temperature=1e-300, top_k=2)) == pytest.approx({3: 1, 0: 0})
    assert probabilities([1.0, 1.0, 0.0], Sampler(temperature=1e300)) == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})


@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=3000).map(lambda values: np.array(values, np.float32)),
    st.integers(1, 40),
)
def test_top_tokens_are_those_of_a_full_sort(values: np.ndarray, count: int) -> None:
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert top_tokens(values, count).tolist() == expected


def test_log_softmax_is_normalized_and_untouched_by_a_shift() -> None:
    logits = np.random.default_rng(1).normal(0, 5, (3, 7000)).astype(np.float32)
    logprobs = log_softmax(logits)
    assert np.exp(logprobs.astype(np.float64)).sum(axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert np.abs(log_softmax(logits + 64) - logprobs).max() < 2e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    with pytest.raises(EngineError, match=f"the logit {bad} for token 1"):
        choose_token(np.array([0, bad, 1], np.float32), Sampler(temperature=temperature), None, Random(0))


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"temperature": -1}, ("temperature", "-1")),
        ({"temperature": math.nan}, ("temperature", "nan")),
        ({"temperature": math.inf}, ("temperature", "inf")),
        ({"temperature": "hot"}, ("temperature", "hot")),
        ({"temperature": True}, ("temperature", "True")),
        ({"top_k": -1}, ("top_k", "-1")),
        ({"top_k": 2.5}, ("top_k", "2.5")),
        ({"top_p": 1.1}, ("top_p", "1.1")),
        ({"top_p": -0.1}, ("top_p", "-0.1")),
        ({"min_p": 2}, ("min_p", "2")),
        ({"repetition_penalty": 0}, ("repetition_penalty", "0")),
        ({"presence_penalty": math.inf}, ("presence_penalty", "inf")),
        ({"frequency_penalty": math.nan}, ("frequency_penalty", "nan")),
        ({"seed": 1.5}, ("seed", "1.5")),
        ({"logit_bias": {-3: 1}}, ("logit_bias", "-3")),
        ({"logit_bias": {3: math.nan}}, ("logit_bias[3]", "nan")),
        ({"logit_bias": {"3": 1.0}}, ("logit_bias", "'3'")),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampler(**settings)
    assert all(part in str(caught.value) for part in parts)


@given(st.lists(st.sampled_from([0.0, 1e-30, 0.25, 1.0, 3.0]), min_size=1, max_size=300), st.floats(0, 1))
def test_the_draw_is_the_place_in_the_running_sum_and_never_a_weight_of_zero(weights: list[float], at: float) -> None:
    share = min(at, math.nextafter(1.0, 0.0))
    if not any(weights):
        return
    # Weights that float64 adds exactly, but for the tiny ones, so that the plain way knows the one right answer.
    place = _place(np.array(weights, np.float32), share)
    assert weights[place] > 0
    sums = np.cumsum([weight if weight > 0.1 else 0.0 for weight in weights])
    if sums[-1] and (np.abs(sums - share * sums[-1]) > 1e-9).all():
        assert place == np.searchsorted(sums, share * sums[-1], side="right")
