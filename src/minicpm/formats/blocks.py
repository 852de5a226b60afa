"""Every storage type of a weight, by name, and the two functions that matter: `decode` and `encode`.

Data is uint8 (rows, row_bytes), values are float32 (rows, columns). Rows are worked on in pieces that stay in the
cache, so memory beside the result stays small. What this leaves out: calibrated rounding, which chooses levels by a
model's own inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from minicpm.errors import FormatError
from minicpm.formats.block_type import AnyArray, BlockType, Bytes, Floats
from minicpm.formats.k_blocks import K_BLOCK_TYPES
from minicpm.formats.simple_blocks import SIMPLE_BLOCK_TYPES

BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType({t.name: t for t in (*SIMPLE_BLOCK_TYPES, *K_BLOCK_TYPES)})
BLOCK_TYPE_OF_GGML_ID: Mapping[int, BlockType] = MappingProxyType({t.ggml_id: t for t in BLOCK_TYPES.values()})

# Weights per piece: 512 KiB of float32, so that the intermediates of one piece fit the second-level cache.
PIECE = 1 << 17


def block_type(name: str) -> BlockType:
    """Return the block type called `name`.

    Raises:
        FormatError: no such type.
    """
    found = BLOCK_TYPES.get(name)
    if found is None:
        raise FormatError(f"block type {name!r} is unknown; known: {', '.join(BLOCK_TYPES)}")
    return found


def decode(name: str, data: Bytes) -> Floats:
    """Return the weights in `data`.

    Args:
        name: a key of `BLOCK_TYPES`.
        data: uint8 (rows, row_bytes); any strides whose last axis is contiguous.

    Returns:
        float32 (rows, columns), equal to the last bit to what llama.cpp's reference decoders give.

    Raises:
        FormatError: unknown type, or rows that are no whole number of blocks.
    """
    kind = block_type(name)
    rows, row_bytes = data.shape
    columns = kind.num_columns(row_bytes)
    values = np.empty((rows, columns), np.float32)
    if not values.size:
        return values
    step = max(1, PIECE // columns)
    # Broken scales decode to NaN, which is theirs to be; a warning would tell nobody where.
    with np.errstate(all="ignore"):
        for start in range(0, rows, step):
            piece = data[start : start + step]
            if kind.block_size > 1:
                piece = piece.reshape(-1, kind.block_bytes)
            values[start : start + step] = kind.decode_blocks(piece).reshape(-1, columns)
    return values


def encode(name: str, values: AnyArray) -> Bytes:
    """Return `values` rounded to the nearest representable weights of a type.

    Args:
        name: a key of `BLOCK_TYPES`.
        values: float (rows, columns); rounding starts from float32.

    Returns:
        uint8 (rows, row_bytes).

    Raises:
        FormatError: unknown type, a row that is no whole number of blocks, or weights that a block type cannot hold
            (NaN, infinity, a scale beyond half precision).
    """
    kind = block_type(name)
    rows, columns = values.shape
    data = np.empty((rows, kind.row_bytes(columns)), np.uint8)
    if not data.size:
        return data
    step = max(1, PIECE // columns)
    # What overflows is refused by the block types and becomes infinity in the float types.
    with np.errstate(all="ignore"):
        for start in range(0, rows, step):
            piece = np.ascontiguousarray(values[start : start + step], dtype=np.float32)
            if kind.block_size > 1:
                piece = piece.reshape(-1, kind.block_size)
            data[start : start + step] = kind.encode_blocks(piece).reshape(-1, data.shape[1])
    return data
