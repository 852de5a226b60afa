"""One tensor of one checkpoint, given the same tensor of the checkpoint before → a header, a base layer, a refinement.

The base layer is a few bits a value and needs only the base layer before it; the refinement adds what is missing to
every bit and needs only the base layer of its own checkpoint. So a chain of checkpoints is a chain of base layers, and
an exact reader fetches one refinement, that of the checkpoint which it wants.

Both layers are lists of chunks of about 1 MiB of values, whole rows of the first axis, that decode alone. Functions
here hold no state and give up the interpreter lock: call them from as many threads as there are tensors. The method is
described in native/history/codec.h and docs/history_format.md.
What this leaves out: where bytes lie, hashes of tensors, and how long a chain grows (`store`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minicpm import _native
from minicpm.errors import CheckpointError
from minicpm.history.frame import Chunk, Header, Layout, inflate

Cells = npt.NDArray[Any]

_BITS = {"uint16": np.uint16, "float32": np.uint32}
# The widest step as a share of what the checkpoint before leaves unexplained. A wider one makes the base layer smaller,
# and the two layers together larger: within a bin the refinement takes all values for equally likely.
_COARSENESS = 0.9
_ROW_BYTES = 3
# A symbol's probability is at most 1 - 2^-15, so that so many of them take a byte at least.
_MOST_CELLS_PER_BYTE = 200_000


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
    return Header.from_bytes(header).layout.chunks()


def encode(cells: Cells, previous: Reference | None, *, base_error: float = 0.06) -> Encoded:
    """Return a tensor coded.

    Args:
        cells: bf16 as uint16, or float32; any shape.
        previous: of the checkpoint before; None makes a key frame.
        base_error: the base layer's root mean square error as a share of the row's standard deviation;
            of a single row up to 1.5 times that, for steps are powers of two.

    Raises:
        ValueError: another type of cells, or a reference of another shape or type.
    """
    if cells.dtype.name not in _BITS:
        raise ValueError(f"cells are bf16 as uint16 or float32, got {cells.dtype}")
    if previous is not None and (previous.base.shape, previous.base.dtype) != (cells.shape, cells.dtype):
        raise ValueError(f"a tensor {cells.shape} cannot be coded from one {previous.base.shape}")
    layout = Layout(cells.dtype.name, cells.shape)
    flat = _flat(cells)
    before = _flat(previous.base) if previous is not None else None
    reference = np.empty_like(flat)
    base, refinement = [], []
    if flat.size:
        rows, columns, within = _native.fit_cells(flat, before, layout.width, base_error, _COARSENESS)
    else:
        columns, within = np.zeros(0, np.int8), np.zeros(64, np.uint16)
    for part in layout.chunks():
        at = slice(part.start * layout.row_cells, part.stop * layout.row_cells)
        own = rows[at.start // layout.width : -(-at.stop // layout.width)]
        old = before[at] if before is not None else None
        numerals, low = _native.encode_cells(flat[at], old, own, columns, within, reference[at])
        deflated = zlib.compress(own.T.tobytes(), 9)
        base.append(len(deflated).to_bytes(4, "little") + deflated + numerals)
        refinement.append(low)
    chunks = [Chunk(len(a), zlib.crc32(a), len(b), zlib.crc32(b)) for a, b in zip(base, refinement, strict=True)]
    header = Header(layout, previous is not None, columns, within, chunks)
    return Encoded(header.to_bytes(), base, refinement, Reference(reference.view(cells.dtype).reshape(cells.shape)))


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
        ValueError: rows that are not those of whole chunks.
    """
    opened = Header.from_bytes(header)
    layout = opened.layout
    wanted = opened.find(rows)
    shape = layout.shape if rows is None else (rows.stop - rows.start, *layout.shape[1:])
    _check(opened, wanted, base, refinement)
    if (previous is not None) != opened.has_previous:
        raise CheckpointError("a key frame takes no reference, and every other frame takes one")
    if previous is not None and (previous.base.shape, previous.base.dtype.name) != (shape, layout.dtype):
        raise CheckpointError(f"a tensor {shape} cannot be decoded from one {previous.base.shape}")
    before = _flat(previous.base) if previous is not None else None
    kept = np.empty(Layout(layout.dtype, shape).num_cells, _BITS[layout.dtype])
    exact = np.empty_like(kept) if refinement is not None else None
    start = rows.start * layout.row_cells if rows is not None else 0
    parts = layout.chunks()
    for at, index in enumerate(wanted):
        span = slice(parts[index].start * layout.row_cells - start, parts[index].stop * layout.row_cells - start)
        low = refinement[at] if refinement is not None else None
        try:
            own, numerals = _split(base[at], -(-(span.stop - span.start) // layout.width))
            _native.decode_cells(
                numerals,
                low,
                before[span] if before is not None else None,
                own,
                opened.columns,
                opened.within,
                kept[span],
                exact[span] if exact is not None else None,
            )
        except (ValueError, zlib.error) as error:
            raise CheckpointError(f"chunk {index} is damaged: {error}") from error
    values = kept if exact is None else exact
    return values.view(layout.dtype).reshape(shape), Reference(kept.view(layout.dtype).reshape(shape))


def _check(opened: Header, wanted: range, base: Sequence[bytes], refinement: Sequence[bytes] | None) -> None:
    """Hold what is given to the table of chunks, before anything is made of it."""
    for layer, name in ((base, "base layer"), (refinement, "refinement")):
        if layer is not None and len(layer) != len(wanted):
            raise CheckpointError(f"{len(layer)} chunks of the {name} were given instead of {len(wanted)}")
    for at, index in enumerate(wanted):
        chunk = opened.chunks[index]
        if (len(base[at]), zlib.crc32(base[at])) != (chunk.base_bytes, chunk.base_crc):
            raise CheckpointError(f"chunk {index} of the base layer is damaged: its size or checksum is another")
        if refinement is not None:
            low = refinement[at]
            if (len(low), zlib.crc32(low)) != (chunk.refinement_bytes, chunk.refinement_crc):
                raise CheckpointError(f"chunk {index} of the refinement is damaged: its size or checksum is another")
        part = opened.layout.chunks()[index]
        if (part.stop - part.start) * opened.layout.row_cells > _MOST_CELLS_PER_BYTE * len(base[at]):
            raise CheckpointError(f"chunk {index} of the base layer is damaged: too short for what it should hold")


def _split(chunk: bytes, num_rows: int) -> tuple[npt.NDArray[np.uint8], bytes]:
    """Return a chunk's rows, uint8 (num_rows, 3), and its numerals."""
    end = 4 + int.from_bytes(chunk[:4], "little")
    planes = np.frombuffer(inflate(chunk[4:end], _ROW_BYTES * num_rows), np.uint8)
    return np.ascontiguousarray(planes.reshape(_ROW_BYTES, num_rows).T), chunk[end:]


def _flat(cells: Cells) -> Cells:
    return np.ascontiguousarray(cells).reshape(-1).view(_BITS[cells.dtype.name])
