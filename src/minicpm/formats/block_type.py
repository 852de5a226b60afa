"""`BlockType`: how a row of weights is cut into blocks of bytes. What this leaves out: any arithmetic on blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minicpm.errors import FormatError

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
AnyArray: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class BlockType:
    """One storage type: `block_size` weights of a row take `block_bytes` bytes.

    `decode_blocks` maps uint8 (n, block_bytes) to float32 (n, block_size); `encode_blocks` is its nearest-rounding
    inverse.
    """

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int
    decode_blocks: Callable[[Bytes], Floats]
    encode_blocks: Callable[[Floats], Bytes]

    def row_bytes(self, num_columns: int) -> int:
        """Return the bytes of a row of `num_columns` weights.

        Raises:
            FormatError: the row is no whole number of blocks.
        """
        if num_columns % self.block_size:
            raise FormatError(
                f"a row of {num_columns} weights cannot be stored as {self.name}: no multiple of {self.block_size}"
            )
        return num_columns // self.block_size * self.block_bytes

    def num_columns(self, row_bytes: int) -> int:
        """Return how many weights a row of `row_bytes` bytes holds.

        Raises:
            FormatError: the row is no whole number of blocks.
        """
        if row_bytes % self.block_bytes:
            raise FormatError(
                f"a row of {row_bytes} bytes is no multiple of {self.name}'s {self.block_bytes} bytes a block"
            )
        return row_bytes // self.block_bytes * self.block_size


def half_bytes(scale: AnyArray, name: str) -> Bytes:
    """Return float32 (n, 1) rounded to half precision, as uint8 (n, 2).

    Raises:
        FormatError: a value is NaN or beyond half precision, so that the block would decode to nonsense.
    """
    half = scale.astype("<f2")
    if not np.isfinite(half).all():
        raise FormatError(f"weights that are NaN, infinite or need a scale beyond 65504 cannot be stored as {name}")
    return half.view(np.uint8)


def inverse(scale: Floats) -> Floats:
    """Return 1/scale in float32, and 0 where the scale is 0 or so small that its inverse overflows."""
    result = np.float32(1) / scale
    result[~np.isfinite(result)] = 0
    return result


def half_floats(data: Bytes) -> Floats:
    """Return the half-precision numbers in uint8 (n, 2k) as float32 (n, k)."""
    return data.view("<f2").astype(np.float32)
