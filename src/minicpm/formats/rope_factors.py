"""The divisors of the rotary frequencies that GGUF files keep in the tensor `rope_freqs.weight`.

`llama3` and `ntk_by_parts` are the same ramp over the number of rotations within the trained context, so one formula
serves both. What this leaves out: `linear`, a number in the metadata, and `dynamic`, which depends on the sequence.

Source: YaRN (arXiv 2309.00071) §3.2; llama.cpp `convert_hf_to_gguf.py` (the tensor's meaning).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.errors import FormatError
from minicpm.formats.block_type import Floats

# What the published Llama 3.1 and 3.2 models use; their GGUF files keep the tensor only.
LLAMA3 = RopeScaling("llama3", 8.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0)


def frequency_divisors(scaling: RopeScaling, head_dim: int, rope_theta: float, max_position_embeddings: int) -> Floats:
    """Return by what each rotary frequency is divided, float32 (head_dim/2,)."""
    context = scaling.original_max_position_embeddings or max_position_embeddings
    frequency = rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    rotations = context * frequency / (2 * math.pi)
    ramp = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(ramp, 0.0, 1.0)
    return (1.0 / ((1.0 - kept) / scaling.factor + kept)).astype(np.float32)


def match_divisors(divisors: Floats, config: ModelConfig, hint: RopeScaling | None, where: str) -> RopeScaling:
    """Return the scaling that gives `divisors`: `hint` (what the metadata says) or that of the Llama 3 family.

    Raises:
        FormatError: no supported scaling gives these divisors.
    """
    factor = float(divisors.max(initial=1.0))
    guesses = [hint] if hint is not None else []
    if math.isfinite(factor) and factor > 1.0:
        guesses.append(replace(LLAMA3, factor=factor))
    for guess in guesses:
        expected = frequency_divisors(guess, config.head_dim, config.rope_theta, config.max_position_embeddings)
        if divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-4, atol=0):
            return guess
    raise FormatError(f"{where}: rope_freqs.weight holds divisors that neither llama3 nor ntk_by_parts gives")
