"""The choice of a token against the logits processors of transformers: the same tokens stay, with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minicpm.engine.sampling import Occurrences, Sampler, candidates

transformers = pytest.importorskip("transformers")

VOCABULARY = 9001
PROMPT, REPLY = [5, 17, 17, 300], [17, 44]


def theirs(logits: np.ndarray, sampler: Sampler) -> np.ndarray:
    """The probabilities (V,) that transformers samples from, its processors in the order of its own `generate`."""
    steps: list[Any] = [
        transformers.RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty),
        transformers.TemperatureLogitsWarper(sampler.temperature),
    ]
    steps += [transformers.TopKLogitsWarper(sampler.top_k)] if sampler.top_k else []
    steps += [transformers.TopPLogitsWarper(sampler.top_p)] if sampler.top_p < 1 else []
    steps += [transformers.MinPLogitsWarper(sampler.min_p)] if sampler.min_p else []
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    for step in steps:
        scores = step(torch.tensor([PROMPT + REPLY]), scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


def ours(logits: np.ndarray, sampler: Sampler) -> np.ndarray:
    occurrences = Occurrences(VOCABULARY, PROMPT)
    for token_id in REPLY:
        occurrences.add(token_id)
    ids, weights = candidates(logits, sampler, occurrences if sampler.has_penalties else None)
    found = np.zeros(VOCABULARY)
    found[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return found


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3, "top_k": 50, "top_p": 0.8},
        {"temperature": 1.7},
        {"top_k": 40},
        {"top_p": 0.35},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"top_k": 200, "top_p": 0.9, "min_p": 0.1},
        {"repetition_penalty": 1.3, "top_k": 1000},
        {"repetition_penalty": 0.7, "temperature": 0.8, "top_p": 0.7},
    ],
    ids=str,
)
def test_the_same_tokens_stay_with_the_same_weights(settings: dict[str, Any], spread: float) -> None:
    logits = np.random.default_rng(4).normal(0, spread, VOCABULARY).astype(np.float32)
    sampler = Sampler(**settings)
    expected, found = theirs(logits, sampler), ours(logits, sampler)
    # Where the nucleus ends, sums of different precision may differ by one token.
    assert np.count_nonzero((found > 0) != (expected > 0)) <= 1
    assert np.abs(found - expected).max() <= 1e-4 * expected.max()
