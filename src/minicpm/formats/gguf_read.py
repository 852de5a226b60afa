"""Our own GGUF reader over a mapped file: versions 2 and 3, little endian, one file.

Every length, count, offset, type, product of dimensions and overlap is checked against the file before anything is
allocated, so a truncated or hostile file ends in a `FormatError` that names the byte. Tensors are views of the mapping.
What this leaves out: what the metadata means (`gguf_config.py`), and split files, which it refuses by name.

Source: the GGUF specification (ggml `docs/gguf.md`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minicpm.errors import FormatError
from minicpm.formats.block_type import Bytes
from minicpm.formats.blocks import BLOCK_TYPE_OF_GGML_ID, BLOCK_TYPES
from minicpm.formats.gguf_metadata import Cursor, Metadata, read_metadata
from minicpm.formats.mapped_file import map_file
from minicpm.formats.weight import Weight

MAGIC = b"GGUF"
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
# ggml's other types, so that a message can call them by name.
UNSUPPORTED_TYPES: Mapping[int, str] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `offset` counts from the start of the file; `shape` is row-major (the file's reversed)."""

    name: str
    block_type: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """An open file: its metadata, its tensors' places, and the mapped bytes."""

    path: Path
    version: int
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    data: Bytes

    def weight(self, name: str) -> Weight:
        """Return the tensor called `name` as a view of the mapped file, rows in the file's order."""
        info = self.tensors[name]
        num_rows = int(np.prod(info.shape[:-1], dtype=np.int64))
        return Weight(
            info.block_type,
            info.shape,
            self.data[info.offset : info.offset + info.num_bytes].reshape(num_rows, info.num_bytes // num_rows),
        )


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Map the file at `path` and read its header.

    Raises:
        FormatError: not a GGUF file, or a broken one, with the byte offset.
    """
    path = Path(path)
    return parse_gguf(map_file(path), path)


def parse_gguf(data: Bytes, path: Path) -> GGUFFile:
    """Read the header in `data`, uint8 (size,); `path` is for messages.

    Raises:
        FormatError: with the byte offset.
    """
    if data[:4].tobytes() != MAGIC:
        raise FormatError(f"{path} is not a GGUF file: it starts with {data[:4].tobytes()!r}, expected {MAGIC!r}")
    cursor = Cursor(data, str(path), position=4)
    version = cursor.u32("the version")
    if version not in (2, 3):
        kind = "a big-endian file" if version in (2 << 24, 3 << 24) else f"GGUF version {version}"
        raise cursor.fail(f"{kind} is not supported; known: little-endian GGUF versions 2 and 3", 4)
    num_tensors = cursor.u64("the tensor count")
    num_keys = cursor.u64("the metadata count")
    metadata = read_metadata(cursor, num_keys)
    _refuse_split(metadata, path)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 65536 or alignment & (alignment - 1):
        raise FormatError(f"{path}: general.alignment must be a power of two up to 65536, got {repr(alignment)[:40]}")
    return GGUFFile(path, version, metadata, _read_tensors(cursor, num_tensors, alignment), data)


def _refuse_split(metadata: Metadata, path: Path) -> None:
    count = metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        number = metadata.get("split.no", 0)
        part = f"part {number + 1} of {count}" if isinstance(number, int) else f"one of {count} parts"
        raise FormatError(f"{path} is {part} of a split GGUF; join the parts first: llama-gguf-split --merge")


def _read_tensors(cursor: Cursor, num_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    left = len(cursor.buffer) - cursor.position
    if num_tensors > MAX_TENSORS or num_tensors * 32 > left:
        raise cursor.fail(
            f"the header claims {num_tensors} tensors; the file has room for {min(left // 32, MAX_TENSORS)}"
        )
    tensors: dict[str, TensorInfo] = {}
    for i in range(num_tensors):
        at = cursor.position
        info = _read_tensor(cursor, i, alignment)
        if info.name in tensors:
            raise cursor.fail(f"the tensor {info.name!r} occurs twice", at)
        tensors[info.name] = info
    base = -(-cursor.position // alignment) * alignment
    placed = {
        name: TensorInfo(name, info.block_type, info.shape, base + info.offset, info.num_bytes)
        for name, info in tensors.items()
    }
    end, before = base, "the header"
    for info in sorted(placed.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise cursor.fail(f"the tensor {info.name!r} overlaps {before}", info.offset)
        end, before = info.offset + info.num_bytes, repr(info.name)
        if end > len(cursor.buffer):
            raise cursor.fail(
                f"truncated: the tensor {info.name!r} ends at byte {end}, the file has {len(cursor.buffer)}",
                info.offset,
            )
    return placed


def _read_tensor(cursor: Cursor, index: int, alignment: int) -> TensorInfo:
    """Read one entry of the tensor table; the offset still counts from the start of the data."""
    name = cursor.printable(f"the name of tensor {index}", 1 << 12)
    at = cursor.position
    num_dimensions = cursor.u32(f"the dimension count of {name!r}")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"the tensor {name!r} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} can be", at)
    dimensions = [cursor.u64(f"a dimension of {name!r}") for _ in range(num_dimensions)]
    num_weights = 1
    for dimension in dimensions:
        num_weights *= dimension
        # Python's integers do not overflow; the bound keeps later arithmetic in 64 bits.
        if not 0 < num_weights < 1 << 62:
            raise cursor.fail(f"the tensor {name!r} has the impossible dimensions {dimensions}", at)
    at = cursor.position
    type_number = cursor.u32(f"the type of {name!r}")
    kind = BLOCK_TYPE_OF_GGML_ID.get(type_number)
    if kind is None:
        known = UNSUPPORTED_TYPES.get(type_number)
        found = f"{known} (type {type_number})" if known else f"the unknown type {type_number}"
        raise cursor.fail(f"the tensor {name!r} has {found}; supported: {', '.join(BLOCK_TYPES)}", at)
    if dimensions[0] % kind.block_size:
        raise cursor.fail(f"the tensor {name!r} has rows of {dimensions[0]}, no multiple of {kind.block_size}", at)
    at = cursor.position
    offset = cursor.u64(f"the offset of {name!r}")
    num_bytes = num_weights // kind.block_size * kind.block_bytes
    if offset + num_bytes > len(cursor.buffer):
        raise cursor.fail(f"truncated: the tensor {name!r} of {num_bytes} bytes lies beyond the file", at)
    if offset % alignment:
        raise cursor.fail(f"the tensor {name!r} lies at offset {offset}, no multiple of the alignment {alignment}", at)
    return TensorInfo(name, kind.name, tuple(reversed(dimensions)), offset, num_bytes)
