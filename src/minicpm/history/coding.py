"""How a part of a tensor becomes bytes: a table of codings, and how tensors are cut into parts.

    bf16    the progressive codec: from the previous checkpoint's values, base layer and refinement (`codec`)
    planes  the bytes of equal significance together, deflated: float32, float16, vectors; always exact

A tensor is cut into parts of at most `PART_BYTES`, coded alone, so that memory stays bounded whatever the size of an
embedding. What this leaves out: where the bytes lie (`manifest`).
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicpm.errors import CheckpointError
from minicpm.formats.block_type import Bytes
from minicpm.formats.weight import Weight

PART_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20
_BYTES_PER_VALUE = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Coded:
    """One part of one checkpoint; `reference` is what the next one is coded from, None if it never is."""

    header: bytes
    base: list[bytes]
    refinement: list[bytes]
    reference: Any


def digest(data: Bytes) -> str:
    """Return the SHA-256, in hex, of a tensor's raw bytes."""
    return hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()


def coding_of(weight: Weight) -> str:
    """Return the coding for `weight`.

    Raises:
        CheckpointError: a quantized type; a history holds what training made.
    """
    if weight.block_type not in _BYTES_PER_VALUE:
        raise CheckpointError(f"a history holds float tensors, got {weight.block_type}")
    return "bf16" if weight.block_type == "BF16" and len(weight.shape) > 1 else "planes"


def uses_previous(coding: str) -> bool:
    """Return whether a part is coded from its values of before."""
    return coding == "bf16"


def reference_bytes(reference: Any) -> int:
    """Return the memory that a reference takes; 0 without one."""
    return reference.num_bytes if reference is not None else 0


def cut(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, rows) of every part."""
    step = max(1, PART_BYTES // row_bytes)
    for first in range(0, num_rows, step):
        yield first, min(step, num_rows - first)


def encode(coding: str, data: Bytes, block_type: str, previous: Any, base_error: float) -> Coded:
    """Return a part coded.

    Args:
        coding: a key of the table above.
        data: raw little-endian values, uint8 (rows, row_bytes).
        block_type: of the tensor.
        previous: the reference of the part before, None for a key frame.
        base_error: of the base layer.
    """
    if coding == "planes":
        return Coded(b"", _planes(data, _BYTES_PER_VALUE[block_type]), [], None)
    from minicpm.history import codec

    coded = codec.encode(np.ascontiguousarray(data).view("<u2"), previous, base_error=base_error)
    return Coded(coded.header, coded.base, coded.refinement, coded.reference)


def decode(
    coding: str,
    pieces: Sequence[bytes],
    refinement: Sequence[bytes] | None,
    previous: Any,
    shape: tuple[int, int],
    block_type: str,
) -> tuple[Bytes, Any]:
    """Return the raw bytes of a part, uint8 `shape` (rows, row_bytes), and its reference.

    Args:
        coding: a key of the table above.
        pieces: the header, then the base layer's chunks.
        refinement: its chunks; None reads the base layer alone.
        previous: the reference of the frame before, read to the same precision.
        shape: of the result.
        block_type: of the tensor.

    Raises:
        CheckpointError: damaged bytes.
    """
    if coding == "planes":
        return _from_planes(pieces[1:], shape, _BYTES_PER_VALUE[block_type]), None
    if coding != "bf16":
        raise CheckpointError(f"the coding {coding!r} is not known to this program; upgrade minicpm")
    from minicpm.history import codec

    cells, reference = codec.decode(pieces[0], list(pieces[1:]), refinement, previous, shape[0])
    return cells.view(np.uint8).reshape(shape), reference


def _planes(data: Bytes, width: int) -> list[bytes]:
    flat = data.reshape(-1)
    return [
        zlib.compress(np.ascontiguousarray(flat[i : i + _CHUNK_BYTES].reshape(-1, width).T).tobytes(), 6)
        for i in range(0, flat.size, _CHUNK_BYTES)
    ]


def _from_planes(chunks: Sequence[bytes], shape: tuple[int, int], width: int) -> Bytes:
    size = shape[0] * shape[1]
    data = np.empty(size, np.uint8)
    starts = range(0, size, _CHUNK_BYTES)
    if len(chunks) != len(starts):
        raise CheckpointError(f"{len(chunks)} chunks instead of {len(starts)}")
    for start, chunk in zip(starts, chunks, strict=True):
        length = min(_CHUNK_BYTES, size - start)
        reader = zlib.decompressobj()
        try:
            plain = reader.decompress(chunk, length + 1)
        except zlib.error as error:
            raise CheckpointError(f"a chunk cannot be inflated ({error})") from error
        if len(plain) != length or not reader.eof:
            raise CheckpointError(f"a chunk holds {len(plain)} bytes instead of {length}")
        data[start : start + length] = np.frombuffer(plain, np.uint8).reshape(width, -1).T.reshape(-1)
    return data.reshape(shape)
