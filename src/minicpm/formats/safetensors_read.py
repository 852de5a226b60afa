"""Our own safetensors reader over a mapped file, and the shards of a folder.

The header is checked in full before a tensor is touched: lengths, dtypes, shapes, offsets, overlaps, gaps. bfloat16 is
read (`safetensors.numpy` cannot). What this leaves out: what packed integers mean
(`int4_folder.py`), and names of other languages than HF's.

Source: the safetensors format description (huggingface/safetensors README, "Format").
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minicpm.errors import CheckpointError, FormatError
from minicpm.formats.block_type import AnyArray, Bytes
from minicpm.formats.json_file import parse_json, read_json
from minicpm.formats.mapped_file import map_file
from minicpm.formats.weight import Weight

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# dtype -> bytes; only the first three become weights, which have the same names there.
DTYPE_BYTES: Mapping[str, int] = {
    "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
WEIGHT_DTYPES = ("F32", "F16", "BF16")
_NUMPY_DTYPES: Mapping[str, str] = {"I32": "<i4", "F16": "<f2", "F32": "<f4", "I64": "<i8"}
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor's dtype, shape (row-major), and first byte counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """An open file: its tensors' places, the text metadata, and the mapped bytes."""

    path: Path
    tensors: Mapping[str, TensorPlace]
    metadata: Mapping[str, str]
    data: Bytes

    def weight(self, name: str) -> Weight:
        """Return the tensor called `name` as a view of the mapped file.

        Raises:
            FormatError: a dtype or shape that no weight has.
        """
        place = self.tensors[name]
        if place.dtype not in WEIGHT_DTYPES:
            raise FormatError(
                f"{self.path}: {name} has the unsupported dtype {place.dtype}; known: {', '.join(WEIGHT_DTYPES)}"
            )
        if not place.num_bytes or not place.shape:
            raise FormatError(f"{self.path}: {name} has the shape {place.shape}, which no weight has")
        num_rows = math.prod(place.shape[:-1])
        data = self.data[place.offset : place.offset + place.num_bytes].reshape(num_rows, -1)
        return Weight(place.dtype, place.shape, data)

    def array(self, name: str) -> AnyArray:
        """Return the numbers of the tensor called `name`, a view of the mapped file, for what is no weight.

        Raises:
            FormatError: a dtype that numpy lacks or no layout uses.
        """
        place = self.tensors[name]
        if place.dtype not in _NUMPY_DTYPES or not place.num_bytes:
            raise FormatError(f"{self.path}: {name} is {place.dtype} {place.shape}, which no packed matrix has")
        data = np.ascontiguousarray(self.data[place.offset : place.offset + place.num_bytes])
        return data.view(_NUMPY_DTYPES[place.dtype]).reshape(place.shape)


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Map the file at `path` and read its header.

    Raises:
        FormatError: not a safetensors file, or a broken one.
    """
    path = Path(path)
    return parse_safetensors(map_file(path), path)


def parse_safetensors(data: Bytes, path: Path) -> SafetensorsFile:
    """Read the header in `data`, uint8 (size,); `path` is for messages.

    Raises:
        FormatError: naming the tensor or the offset.
    """
    length = int.from_bytes(data[:8].tobytes(), "little")
    if data.size < 8 or not 2 <= length <= min(data.size - 8, MAX_HEADER_BYTES):
        raise FormatError(
            f"{path} is no safetensors file or is truncated: its header claims {length} bytes, the file has {data.size}"
        )
    header = parse_json(data[8 : 8 + length].tobytes(), f"{path}: the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map names to text")
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{path}: the header names {len(header)} tensors; at most {MAX_TENSORS} are supported")
    tensors = {name: _place(name, value, 8 + length, data.size, path) for name, value in header.items()}
    end, before = 8 + length, "the header"
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if place.offset != end:
            what = "overlaps" if place.offset < end else f"leaves a gap of {place.offset - end} bytes after"
            raise FormatError(f"{path}: at byte {place.offset}: the tensor {name!r} {what} {before}")
        end, before = place.offset + place.num_bytes, repr(name)
    if end != data.size:
        raise FormatError(f"{path}: the tensors end at byte {end}, the file has {data.size}")
    return SafetensorsFile(path, tensors, metadata, data)


def _place(name: str, value: Any, start: int, size: int, path: Path) -> TensorPlace:
    where = f"{path}: the tensor {name[:80]!r}"
    if not name.isprintable() or not name:
        raise FormatError(f"{where} has a name that cannot be printed")
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise FormatError(f"{where} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FormatError(f"{where} has the unknown dtype {repr(dtype)[:40]}")
    for numbers, what in ((shape, "shape"), (offsets, "data_offsets")):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
            raise FormatError(f"{where}: {what} must be a list of whole numbers, got {repr(numbers)[:60]}")
    if len(shape) > 8 or len(offsets) != 2:
        raise FormatError(f"{where} has {len(shape)} axes and {len(offsets)} offsets; at most 8 and just 2 can be")
    first, last = offsets
    if not first <= last <= size - start:
        raise FormatError(f"{where} claims the bytes {first} to {last} of {size - start}: truncated or broken")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if num_bytes != last - first:
        raise FormatError(f"{where} of shape {tuple(shape)} and {dtype} takes {num_bytes} bytes, not {last - first}")
    return TensorPlace(dtype, tuple(shape), start + first, num_bytes)


def open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """Return for every tensor of the folder's safetensors the open file that holds it.

    Raises:
        FormatError: no safetensors there, a broken file, or an index that points outside the folder.
        CheckpointError: missing shards, or shards and index that do not agree; all of it is listed.
    """
    if (folder / SINGLE).exists():
        file = open_safetensors(folder / SINGLE)
        return dict.fromkeys(file.tensors, file)
    files_of = read_index(folder / INDEX)
    shards = sorted(set(files_of.values()))
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}")
    opened = {shard: open_safetensors(folder / shard) for shard in shards}
    problems = [f"{name} is not in {shard}" for name, shard in files_of.items() if name not in opened[shard].tensors]
    for shard, file in opened.items():
        problems += [
            f"{name} is in {shard}, but not by the index" for name in file.tensors if files_of.get(name) != shard
        ]
    if problems:
        raise CheckpointError(f"{folder}: {INDEX} and the shards do not agree: {'; '.join(problems)}")
    return {name: opened[shard] for name, shard in files_of.items()}


def read_index(path: Path) -> dict[str, str]:
    """Return the tensor -> file name table of an index file.

    Raises:
        FormatError: not an index, or a name that is not a plain file name (it could lead out of the folder).
    """
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise FormatError(f"{path}: weight_map must map tensor names to file names")
    for name in sorted(set(table.values())):
        if name in ("", ".", "..") or not name.isprintable() or any(sign in name for sign in "/\\:\0"):
            raise FormatError(f"{path}: the shard {name[:80]!r} is not a file of the folder itself; that is refused")
    return table
