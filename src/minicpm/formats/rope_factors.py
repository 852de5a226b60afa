"""The divisors of the rotary frequencies that GGUF files keep in the tensor `rope_freqs.weight`.

What this leaves out: the frequencies themselves (`ModelConfig.rope_frequencies`), `linear` scaling, which is a number
in the metadata, and `dynamic`, which depends on the sequence.

Source: llama.cpp `convert_hf_to_gguf.py` (the tensor's meaning).
"""

from __future__ import annotations

import math

import numpy as np

from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.errors import FormatError
from minicpm.formats.block_type import Floats

ROPE_TENSOR = "rope_freqs.weight"
RAMPS = ("llama3", "ntk_by_parts")


def frequency_divisors(config: ModelConfig) -> Floats:
    """Return by what `config.rope_scaling` divides each rotary frequency, float32 (head_dim/2,)."""
    plain = config.replace(rope_scaling=None).rope_frequencies()
    return np.divide(plain, config.rope_frequencies()).astype(np.float32)


def match_divisors(divisors: Floats, config: ModelConfig, hint: RopeScaling | None, where: str) -> RopeScaling | None:
    """Return the scaling that gives `divisors`: `hint` (what the metadata says) or that of the Llama 3 family.

    Raises:
        FormatError: no supported scaling gives these divisors.
    """
    # The published Llama 3.1 and 3.2 models differ in the factor only, and their GGUF files keep nothing but the
    # tensor.
    if divisors.shape != (config.head_dim // 2,):
        raise FormatError(f"{where}: {ROPE_TENSOR} has shape {divisors.shape}, expected ({config.head_dim // 2},)")
    if (divisors == 1).all():
        return None
    factor = float(divisors.max())
    guesses = [hint] if hint is not None else []
    if math.isfinite(factor) and factor > 1.0:
        guesses.append(RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0))
    for guess in guesses:
        if np.allclose(divisors, frequency_divisors(config.replace(rope_scaling=guess)), rtol=1e-4, atol=0):
            return guess
    raise FormatError(f"{where}: {ROPE_TENSOR} holds divisors that neither llama3 nor ntk_by_parts gives")
