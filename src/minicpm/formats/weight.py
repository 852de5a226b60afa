"""`Weight`: one named tensor as it lies in a file, in a block type, with its logical shape.

What this leaves out: names (`names.py`), arithmetic (`blocks.py`), and where the bytes came from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minicpm.errors import FormatError
from minicpm.formats import blocks
from minicpm.formats.block_type import AnyArray, Bytes, Floats


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of `shape` (row-major, last axis contiguous) held as `data`, uint8 (rows, row_bytes).

    `rows` is the product of all axes but the last, 1 for a vector. `data` is often a read-only view of a mapped file.

    Raises:
        FormatError: `data` has not the size that `shape` and `block_type` give.
    """

    block_type: str
    shape: tuple[int, ...]
    data: Bytes

    def __post_init__(self) -> None:
        expected = (self.num_rows, blocks.block_type(self.block_type).row_bytes(self.shape[-1]))
        if self.data.shape != expected or self.data.dtype != np.uint8:
            raise FormatError(
                f"a {self.block_type} tensor of shape {self.shape} takes uint8 {expected}, "
                f"got {self.data.dtype} {self.data.shape}"
            )

    @property
    def num_rows(self) -> int:
        """The number of rows of `data`."""
        return math.prod(self.shape[:-1])

    @property
    def num_weights(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """The bytes that the encoded data takes."""
        return self.data.size

    @classmethod
    def from_array(cls, array: AnyArray, block_type: str = "F32") -> Weight:
        """Return `array` (any float dtype, at least one axis) rounded to `block_type`.

        Raises:
            FormatError: the last axis is no whole number of blocks, or the values do not fit the type.
        """
        if array.ndim == 0:
            raise FormatError("a weight needs at least one axis, got a scalar")
        return cls(block_type, array.shape, blocks.encode(block_type, array.reshape(-1, array.shape[-1])))

    def decode(self) -> Floats:
        """Return the weights as float32 of `shape`."""
        return blocks.decode(self.block_type, self.data).reshape(self.shape)

    def decode_rows(self, start: int, stop: int) -> Floats:
        """Return rows `start` up to `stop` as float32 (stop - start, columns)."""
        return blocks.decode(self.block_type, self.data[start:stop])

    def encode(self, block_type: str) -> Weight:
        """Return the same weights in another block type; itself when it has that type already."""
        return self if block_type == self.block_type else Weight.from_array(self.decode(), block_type)

    def take_rows(self, order: npt.NDArray[np.intp]) -> Weight:
        """Return a copy whose row i is row `order[i]` of this one; blocks never cross rows, so nothing is rounded."""
        return Weight(self.block_type, (*self.shape[:-2], len(order), self.shape[-1]), self.data[order])
