"""The header of a coded tensor: type, shape, the table of chunks, and what all of its chunks are coded with.

Byte format: docs/history_format.md.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minicpm.errors import CheckpointError

CHUNK_BYTES = 1 << 20
NUM_KNOTS = 64
# Shorter rows are coded several at a time.
_SHORT_ROW = 64
_JOINED_CELLS = 1024

_MAGIC = b"mch"
_VERSION = 1
_DTYPES = ("uint16", "float32")
_START = struct.Struct("<3sBBBBI")
_CHUNK = struct.Struct("<4I")


@dataclass(frozen=True)
class Chunk:
    """Bytes and CRC-32 of a chunk's two layers."""

    base_bytes: int
    base_crc: int
    refinement_bytes: int
    refinement_crc: int


@dataclass(frozen=True)
class Layout:
    """How a tensor is cut: rows of the first axis into chunks, values into rows of `width`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def row_cells(self) -> int:
        """Values in a row of the first axis."""
        return math.prod(self.shape[1:])

    @property
    def num_cells(self) -> int:
        """Values in all."""
        return math.prod(self.shape)

    @property
    def _joined(self) -> int:
        """Rows of the first axis that are coded as one."""
        return _JOINED_CELLS // self.row_cells if self.row_cells < _SHORT_ROW else 1

    @property
    def width(self) -> int:
        """Values in a row as coded; the last row of a chunk may be shorter."""
        return min(self.row_cells * self._joined, self.num_cells) if self.num_cells else 0

    @property
    def rows_per_chunk(self) -> int:
        """Rows of the first axis in every chunk but the last."""
        step = CHUNK_BYTES // (self.row_cells * np.dtype(self.dtype).itemsize)
        return max(1, step // self._joined) * self._joined

    @property
    def num_chunks(self) -> int:
        """Chunks in all; none for an empty tensor."""
        return -(-(self.shape[0] if self.shape else 1) // self.rows_per_chunk) if self.num_cells else 0

    def chunks(self) -> list[slice]:
        """Return the rows of the first axis that each chunk holds; a tensor without axes has one row."""
        num_rows = self.shape[0] if self.shape else 1
        step = self.rows_per_chunk if self.num_cells else 1
        return [slice(i * step, min((i + 1) * step, num_rows)) for i in range(self.num_chunks)]


@dataclass(frozen=True)
class Header:
    """What the chunks of a tensor share.

    Attributes:
        layout: type, shape, and how they are cut.
        has_previous: whether it was coded from a reference.
        columns: int8 (width,), the offset of each column's scale.
        within: uint16 (NUM_KNOTS,), the distribution of residuals.
        chunks: sizes and checksums.
    """

    layout: Layout
    has_previous: bool
    columns: npt.NDArray[np.int8]
    within: npt.NDArray[np.uint16]
    chunks: list[Chunk]

    def to_bytes(self) -> bytes:
        """Return the header as it is stored."""
        shape = self.layout.shape
        dtype = _DTYPES.index(self.layout.dtype)
        steps = np.diff(self.within, prepend=np.uint16(0)).astype("<u2")
        shared = zlib.compress(steps.tobytes() + self.columns.tobytes(), 9)
        parts = [_START.pack(_MAGIC, _VERSION, dtype, self.has_previous, len(shape), len(self.chunks))]
        parts.append(struct.pack(f"<{len(shape)}Q", *shape))
        parts += [_CHUNK.pack(c.base_bytes, c.base_crc, c.refinement_bytes, c.refinement_crc) for c in self.chunks]
        body = b"".join((*parts, shared))
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> Header:
        """Return the header that `data` holds.

        Raises:
            CheckpointError: not a header, damaged, or of a newer version.
        """
        if len(data) < _START.size + 4 or data[:3] != _MAGIC:
            raise CheckpointError("a frame's header is damaged: it does not begin like one")
        if data[3] != _VERSION:
            raise CheckpointError(f"a frame has version {data[3]}, known is {_VERSION}; upgrade minicpm")
        if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise CheckpointError("a frame's header is damaged: its checksum is another")
        try:
            return cls._parse(data[:-4])
        except (ValueError, struct.error, zlib.error, IndexError) as error:
            raise CheckpointError(f"a frame's header is damaged: {error}") from error

    @classmethod
    def _parse(cls, data: bytes) -> Header:
        _, _, dtype, has_previous, num_axes, num_chunks = _START.unpack_from(data)
        at = _START.size
        layout = Layout(_DTYPES[dtype], struct.unpack_from(f"<{num_axes}Q", data, at))
        at += 8 * num_axes
        if layout.num_chunks != num_chunks or at + num_chunks * _CHUNK.size > len(data):
            raise ValueError("its number of chunks is not that of its shape")
        end = at + num_chunks * _CHUNK.size
        chunks = [Chunk(*fields) for fields in _CHUNK.iter_unpack(data[at:end])]
        shared = inflate(data[end:], 2 * NUM_KNOTS + layout.width)
        within = np.cumsum(np.frombuffer(shared, "<u2", NUM_KNOTS), dtype=np.uint16)
        columns = np.frombuffer(shared, np.int8, offset=2 * NUM_KNOTS)
        return cls(layout, bool(has_previous), columns, within, chunks)

    def find(self, rows: slice | None) -> range:
        """Return the chunks that hold `rows`.

        Raises:
            ValueError: rows that are not those of whole chunks.
        """
        slices = self.layout.chunks()
        if rows is None:
            return range(len(slices))
        stops = [0, *(part.stop for part in slices)]
        if rows.start not in stops or rows.stop not in stops or rows.step not in (None, 1):
            raise ValueError(f"rows {rows.start} to {rows.stop} are not whole chunks, which end at {stops}")
        return range(stops.index(rows.start), stops.index(rows.stop))


def inflate(data: bytes, size: int) -> bytes:
    """Return exactly `size` bytes, inflated; never makes more.

    Raises:
        ValueError: another size.
        zlib.error: damaged bytes.
    """
    reader = zlib.decompressobj()
    plain = reader.decompress(data, size + 1)
    if len(plain) != size or not reader.eof or reader.unused_data:
        raise ValueError(f"{len(plain)} bytes or more are deflated where {size} belong")
    return plain
