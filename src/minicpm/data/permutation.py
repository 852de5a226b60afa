"""The order of things as a function, not as a list: a seeded permutation of 0…n-1 that any place can be asked for.

Nothing is shuffled and nothing is remembered, so the millionth row of an epoch costs what the first does, and every
worker and rank agrees. What this leaves out: secrecy; the order is scrambled, not encrypted.

Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002): Feistel network with cycle walking.
"""

from __future__ import annotations

import hashlib
from typing import cast

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
# Multiplier and shifts of the finalizer of SplitMix64.
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


def key_of(*parts: object) -> int:
    """Return 64 bits that depend on every part and on their order, and on nothing else (no process, no machine)."""
    text = "\x1f".join(map(repr, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `values` scrambled, one to one (the finalizer of SplitMix64)."""
    values = (values ^ (values >> _30)) * _MIX_1
    values = (values ^ (values >> _27)) * _MIX_2
    return cast("NDArray[np.uint64]", values ^ (values >> _31))


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Return where the permutation `key` of 0…size-1 puts each of `index`.

    Args:
        index: places, each in 0…size-1.
        size: how many things there are.
        key: which permutation, 64 bits.
    """
    if size <= 1:
        return np.zeros_like(index)
    half_bits = max(((size - 1).bit_length() + 1) // 2, 1)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))
    values = index.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    # The network permutes the next power of four; a value that lands outside walks on until it is inside. Fewer than
    # four tries on average, and it must end: the walk is a cycle that holds its own start.
    while outside.any():
        walking = values[outside]
        left, right = walking >> shift, walking & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        values[outside] = (left << shift) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)
