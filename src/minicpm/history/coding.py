"""How a part of a tensor becomes bytes: a table of codings, and how tensors are cut into parts.

    progressive  bfloat16 and float32, by the codec: base layer from the one before, refinement (`codec`)
    planes       float16: the bytes of equal significance together, deflated; exact at every precision

A tensor is cut into parts of at most `PART_BYTES`, coded alone, so that memory stays bounded whatever the size of an
embedding. What this leaves out: where the bytes lie (`manifest`).
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minicpm.errors import CheckpointError
from minicpm.formats.block_type import Bytes
from minicpm.formats.weight import Weight
from minicpm.history import codec
from minicpm.history.codec import Reference

PART_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20
_CODING_OF: Mapping[str, str] = {"BF16": "progressive", "F32": "progressive", "F16": "planes"}
# The codec's type of cells.
_CELLS: Mapping[str, str] = {"BF16": "<u2", "F32": "<f4"}


@dataclass(frozen=True)
class Coded:
    """One part of one checkpoint; `base` begins with the header; `reference` is what the next one is coded from."""

    base: list[bytes]
    refinement: list[bytes]
    reference: Reference | None


def digest(data: Bytes) -> str:
    """Return the SHA-256, in hex, of a tensor's raw bytes."""
    return hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()


def coding_of(weight: Weight) -> str:
    """Return the coding for `weight`.

    Raises:
        CheckpointError: a quantized type; a history holds what training made.
    """
    if weight.block_type not in _CODING_OF:
        raise CheckpointError(f"a history holds float tensors ({', '.join(_CODING_OF)}), not {weight.block_type}")
    return _CODING_OF[weight.block_type]


def uses_previous(coding: str) -> bool:
    """Return whether a part is coded from its base layer of before."""
    return coding == "progressive"


def cut(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, rows) of every part."""
    step = max(1, PART_BYTES // row_bytes)
    for first in range(0, num_rows, step):
        yield first, min(step, num_rows - first)


def encode(coding: str, data: Bytes, block_type: str, previous: Reference | None, base_error: float) -> Coded:
    """Return a part coded.

    Args:
        coding: a key of the table above.
        data: raw little-endian values, uint8 (rows, row_bytes).
        block_type: of the tensor.
        previous: of the part before, None for a key frame.
        base_error: of the base layer.
    """
    if coding == "planes":
        return Coded([b"", *_planes(data)], [], None)
    cells = np.ascontiguousarray(data).view(_CELLS[block_type])
    coded = codec.encode(cells, previous, base_error=base_error)
    return Coded([coded.header, *coded.base], coded.refinement, coded.reference)


def decode(
    coding: str,
    base: Sequence[bytes],
    refinement: Sequence[bytes] | None,
    previous: Reference | None,
    shape: tuple[int, int],
) -> tuple[Bytes, Reference | None]:
    """Return the raw bytes of a part, uint8 `shape` (rows, row_bytes), and its reference.

    Args:
        coding: a key of the table above.
        base: the header, then the base layer's chunks.
        refinement: its chunks; None gives the base layer alone.
        previous: the reference of the frame before.
        shape: of the result.

    Raises:
        CheckpointError: damaged bytes.
    """
    if coding == "planes":
        return _from_planes(base[1:], shape), None
    if coding != "progressive":
        raise CheckpointError(f"the coding {coding!r} is not known to this program; upgrade minicpm")
    cells, reference = codec.decode(base[0], base[1:], refinement, previous)
    data = np.ascontiguousarray(cells).reshape(cells.shape[0], -1).view(np.uint8)
    if data.shape != shape:
        raise CheckpointError(f"{data.shape[0]} rows of {data.shape[1]} bytes came instead of {shape[0]} of {shape[1]}")
    return data, reference


def _planes(data: Bytes) -> list[bytes]:
    flat = data.reshape(-1)
    return [
        zlib.compress(np.ascontiguousarray(flat[i : i + _CHUNK_BYTES].reshape(-1, 2).T).tobytes(), 6)
        for i in range(0, flat.size, _CHUNK_BYTES)
    ]


def _from_planes(chunks: Sequence[bytes], shape: tuple[int, int]) -> Bytes:
    size = shape[0] * shape[1]
    starts = range(0, size, _CHUNK_BYTES)
    if len(chunks) != len(starts):
        raise CheckpointError(f"{len(chunks)} chunks instead of {len(starts)}")
    data = np.empty(size, np.uint8)
    for start, chunk in zip(starts, chunks, strict=True):
        length = min(_CHUNK_BYTES, size - start)
        reader = zlib.decompressobj()
        try:
            plain = reader.decompress(chunk, length + 1)
        except zlib.error as error:
            raise CheckpointError(f"a chunk cannot be inflated ({error})") from error
        if len(plain) != length or not reader.eof:
            raise CheckpointError(f"a chunk holds {len(plain)} bytes instead of {length}")
        data[start : start + length] = np.frombuffer(plain, np.uint8).reshape(2, -1).T.reshape(-1)
    return data.reshape(shape)
