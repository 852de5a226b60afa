"""One weight into another block type, with an optional factor, in pieces of rows so that memory stays near the result.

What this leaves out: which weight gets which type (`layout.py`) and which factor (`family.py`).
"""

from __future__ import annotations

import math

import numpy as np

from minicpm.errors import CheckpointError, FormatError
from minicpm.formats import blocks
from minicpm.formats.block_type import Bytes, Floats
from minicpm.formats.weight import Weight

# Weights per piece: 32 MiB of float32.
PIECE = 1 << 23
FLOAT_TYPES = ("F32", "F16", "BF16")


def recast(name: str, weight: Weight, block_type: str, factor: float = 1.0) -> Weight:
    """Return `weight · factor` in `block_type`; itself, untouched to the last bit, when neither changes anything.

    The product is taken in float32 and rounded once to the target type.

    Args:
        name: for messages.
        weight: any block type.
        block_type: the target.
        factor: what every element is multiplied by.

    Raises:
        CheckpointError: an element is NaN or infinite, or becomes so in the target type.
    """
    if block_type == weight.block_type and factor == 1.0:
        return weight
    columns = weight.shape[-1]
    row_bytes = blocks.block_type(block_type).row_bytes(columns)
    data = np.empty((weight.num_rows, row_bytes), np.uint8)
    step = max(1, PIECE // columns)
    for start in range(0, weight.num_rows, step):
        values = weight.decode_rows(start, start + step)
        if factor != 1.0:
            values *= np.float32(factor)
        check_finite(name, values, start)
        try:
            data[start : start + step] = piece = blocks.encode(block_type, values)
        except FormatError as error:
            raise CheckpointError(f"{name} does not fit {block_type}: {error}") from error
        if block_type == "F16":
            _check_overflow(name, piece, values, start)
    return Weight(block_type, weight.shape, data)


def check_finite(name: str, values: Floats, first_row: int = 0) -> None:
    """Return when all `values`, float32 (rows, columns), are finite.

    Raises:
        CheckpointError: naming the first element that is not.
    """
    # A sum is finite only if every element is, and costs a fraction of an element-wise test; an overflow of the sum
    # itself only leads to the exact test.
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(float(values.sum(dtype=np.float64))):
            return
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise CheckpointError(
            f"{name} holds {values[row, column]} at row {row + first_row}, column {column} ({len(bad)} such values in "
            "these rows); a model with NaN or infinity cannot be converted"
        )


def _check_overflow(name: str, halves: Bytes, values: Floats, first_row: int) -> None:
    infinite = np.isinf(halves.view("<f2"))
    if infinite.any():
        row, column = np.argwhere(infinite)[0]
        raise CheckpointError(
            f"{name} overflows fp16: {values[row, column]:g} at row {row + first_row}, column {column} exceeds 65504; "
            "use bf16 or fp32"
        )
