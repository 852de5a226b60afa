"""One tensor of one checkpoint, given the same tensor of the checkpoint before → a header, a base layer, a refinement.

The base layer is a few bits a value and needs only the base layer before it; the refinement adds what is missing to
every bit and needs only the base layer of its own checkpoint. So a chain of checkpoints is a chain of base layers, and
an exact reader fetches one refinement, that of the checkpoint which it wants.

Both layers are lists of chunks of about 1 MiB of values, whole rows of the first axis, that decode alone. Functions
here hold no state and give up the interpreter lock: call them from as many threads as there are tensors.
What this leaves out: where bytes lie, hashes of tensors, and how long a chain grows (`store`).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minicpm.errors import CheckpointError

Cells = npt.NDArray[Any]

_VERSION = 0
_CHUNK_BYTES = 1 << 20
# What the base layer drops of a value.
_MASKS = {"uint16": 0x000F, "float32": 0x0007FFFF}
_BITS = {"uint16": np.uint16, "float32": np.uint32}


@dataclass(frozen=True)
class Reference:
    """What the next checkpoint is coded from: the decoded base layer, in the shape and type of the tensor."""

    base: Cells

    @property
    def num_bytes(self) -> int:
        """The memory that this takes."""
        return self.base.nbytes

    def rows(self, rows: slice) -> Reference:
        """Return the reference of some rows."""
        return Reference(self.base[rows])


@dataclass(frozen=True)
class Encoded:
    """One tensor coded: pass `header`, and the chunks of the layers that are wanted, to `decode`."""

    header: bytes
    base: list[bytes]
    refinement: list[bytes]
    reference: Reference


def chunk_rows(header: bytes) -> list[slice]:
    """Return the rows of the first axis that each chunk holds.

    Raises:
        CheckpointError: not a header of ours, damaged, or of a newer version.
    """
    return _open(header).rows


def encode(cells: Cells, previous: Reference | None, *, base_error: float = 0.07) -> Encoded:
    """Return a tensor coded.

    Args:
        cells: bf16 as uint16, or float32; any shape.
        previous: of the checkpoint before; None makes a key frame.
        base_error: the base layer's root mean square error as a share of the row's standard deviation.

    Raises:
        ValueError: another type of cells, or a reference of another shape or type.
    """
    if cells.dtype.name not in _BITS:
        raise ValueError(f"cells are bf16 as uint16 or float32, got {cells.dtype}")
    if previous is not None and (previous.base.shape, previous.base.dtype) != (cells.shape, cells.dtype):
        raise ValueError(f"a tensor {cells.shape} cannot be coded from one {previous.base.shape}")
    bits = np.ascontiguousarray(cells).reshape(cells.shape).view(_BITS[cells.dtype.name])
    low = bits & bits.dtype.type(_MASKS[cells.dtype.name])
    kept = bits - low
    before = previous.base.view(bits.dtype) if previous is not None else np.zeros_like(bits)
    base, refinement, table = [], [], []
    for rows in _cut(cells.shape, cells.itemsize):
        base.append(_deflate(_rows(kept, rows) - _rows(before, rows)))
        refinement.append(_deflate(_rows(low, rows)))
        table.append([len(base[-1]), zlib.crc32(base[-1]), len(refinement[-1]), zlib.crc32(refinement[-1])])
    fields = {"version": _VERSION, "dtype": cells.dtype.name, "shape": cells.shape, "chunks": table}
    reference = Reference(kept.view(cells.dtype))
    return Encoded(json.dumps(fields).encode(), base, refinement, reference)


def decode(
    header: bytes,
    base: Sequence[bytes],
    refinement: Sequence[bytes] | None,
    previous: Reference | None,
    rows: slice | None = None,
) -> tuple[Cells, Reference]:
    """Return the values, and the reference for the checkpoint after.

    Args:
        header: as encoded.
        base: all chunks of the base layer, or only those that hold `rows`.
        refinement: as many chunks; None gives the values of the base layer.
        previous: the reference that this was coded from, or its `rows`; None for a key frame.
        rows: along the first axis, from the start of a chunk to the end of one (`chunk_rows`); None means all.

    Raises:
        CheckpointError: damaged bytes, a missing chunk, or another reference; it names the chunk.
    """
    opened = _open(header)
    first, last = opened.find(rows)
    for layer, name in ((base, "base"), (refinement, "refinement")):
        if layer is not None and len(layer) != last - first:
            raise CheckpointError(f"{len(layer)} {name} chunks were given instead of {last - first}")
    start = opened.rows[first].start if first < last else 0
    count = opened.rows[last - 1].stop - start if first < last else 0
    shape = opened.shape if rows is None else (count, *opened.shape[1:])
    kept = np.zeros(shape, _BITS[opened.dtype])
    if previous is not None and (previous.base.shape, previous.base.dtype) != (shape, np.dtype(opened.dtype)):
        raise CheckpointError(f"a tensor {shape} cannot be decoded from one {previous.base.shape}")
    values = kept if refinement is None else np.zeros_like(kept)
    for index in range(first, last):
        part = slice(opened.rows[index].start - start, opened.rows[index].stop - start)
        out = _rows(kept, part)
        out[...] = _inflate(base[index - first], opened.chunks[index][:2], out, f"chunk {index} of the base layer")
        if previous is not None:
            out += _rows(previous.base.view(kept.dtype), part)
        if refinement is not None:
            where = f"chunk {index} of the refinement"
            _rows(values, part)[...] = out + _inflate(refinement[index - first], opened.chunks[index][2:], out, where)
    return values.view(opened.dtype), Reference(kept.view(opened.dtype))


@dataclass(frozen=True)
class _Header:
    dtype: str
    shape: tuple[int, ...]
    chunks: list[list[int]]
    rows: list[slice]

    def find(self, rows: slice | None) -> tuple[int, int]:
        """Return the first chunk of `rows` and the one after the last."""
        if rows is None:
            return 0, len(self.rows)
        starts, stops = [r.start for r in self.rows], [r.stop for r in self.rows]
        if rows.start not in starts or rows.stop not in stops:
            raise CheckpointError(f"rows {rows.start} to {rows.stop} are not whole chunks, which start at {starts}")
        return starts.index(rows.start), stops.index(rows.stop) + 1


def _open(header: bytes) -> _Header:
    try:
        fields = json.loads(header)
        if fields["version"] != _VERSION:
            raise CheckpointError(f"a frame has version {fields['version']}; upgrade minicpm")
        shape = tuple(map(int, fields["shape"]))
        rows = list(_cut(shape, np.dtype(fields["dtype"]).itemsize))
        if len(rows) != len(fields["chunks"]) or fields["dtype"] not in _BITS:
            raise ValueError("wrong number of chunks")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"a frame's header is damaged ({error})") from error
    return _Header(fields["dtype"], shape, fields["chunks"], rows)


def _cut(shape: tuple[int, ...], itemsize: int) -> list[slice]:
    num_rows = shape[0] if shape else 1
    row_bytes = itemsize * math.prod(shape[1:])
    if num_rows * row_bytes == 0:
        return []
    step = max(1, _CHUNK_BYTES // row_bytes)
    return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]


def _rows(array: Cells, rows: slice) -> Cells:
    return array[rows] if array.ndim else array.reshape(1)


def _deflate(values: Cells) -> bytes:
    planes = np.ascontiguousarray(values).reshape(-1).view(np.uint8).reshape(-1, values.itemsize).T
    return zlib.compress(np.ascontiguousarray(planes).tobytes(), 1)


def _inflate(data: bytes, check: list[int], like: Cells, where: str) -> Cells:
    if [len(data), zlib.crc32(data)] != check:
        raise CheckpointError(f"{where} is damaged: its length or checksum is another")
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(data, like.nbytes + 1)
    except zlib.error as error:
        raise CheckpointError(f"{where} is damaged ({error})") from error
    if len(plain) != like.nbytes:
        raise CheckpointError(f"{where} holds {len(plain)} bytes instead of {like.nbytes}")
    planes = np.frombuffer(plain, np.uint8).reshape(like.itemsize, -1).T
    return np.ascontiguousarray(planes).view(like.dtype).reshape(like.shape)
