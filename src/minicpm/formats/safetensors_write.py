"""safetensors files and sharded folders, written one tensor at a time, atomically, with the mode that the umask gives.

What this leaves out: `config.json` and everything else that a model folder has beside its weights.

Source: the safetensors format description; transformers' names of shards and index.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minicpm.errors import CheckpointError, FormatError
from minicpm.formats.atomic_file import atomic_file
from minicpm.formats.block_type import AnyArray
from minicpm.formats.json_file import write_json
from minicpm.formats.safetensors_read import DTYPE_BYTES, INDEX, SINGLE, WEIGHT_DTYPES
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry

MAX_SHARD_BYTES = 5_000_000_000
# transformers refuses a file that does not say which framework's layout it has.
METADATA: Mapping[str, str] = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor that is no weight, like packed integers: its dtype in safetensors' words, and what gives its numbers."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], AnyArray]

    @property
    def num_bytes(self) -> int:
        """The bytes that it takes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


AnyEntry = WeightEntry | TensorEntry


def write_safetensors(
    path: str | os.PathLike[str], entries: Mapping[str, AnyEntry], metadata: Mapping[str, str] = METADATA
) -> None:
    """Write one file with `entries` in the given order; at most one weight is alive at a time.

    Raises:
        FormatError: a block type that safetensors does not have.
        CheckpointError: the file cannot be written; nothing is left behind.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, entry in entries.items():
        dtype = entry.dtype if isinstance(entry, TensorEntry) else entry.block_type
        if isinstance(entry, WeightEntry) and dtype not in WEIGHT_DTYPES:
            raise FormatError(f"{name} is {dtype}; safetensors holds {', '.join(WEIGHT_DTYPES)}")
        end = offset + entry.num_bytes
        header[name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned for readers that map it
    with atomic_file(Path(path), 8 + len(text) + offset) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            file.write(np.ascontiguousarray(_made(name, entry)).data)


def _made(name: str, entry: AnyEntry) -> AnyArray:
    made = entry.make()
    if isinstance(made, Weight):
        is_announced = isinstance(entry, WeightEntry) and (made.shape, made.block_type) == (
            entry.shape,
            entry.block_type,
        )
        kind, data = made.block_type, made.data
    else:
        is_announced = made.shape == entry.shape and made.nbytes == entry.num_bytes
        kind, data = str(made.dtype), made
    if not is_announced:
        announced = entry.dtype if isinstance(entry, TensorEntry) else entry.block_type
        raise CheckpointError(f"{name} was announced as {announced} {entry.shape} and came as {kind} {made.shape}")
    return data


def write_safetensors_model(
    folder: str | os.PathLike[str], entries: Mapping[str, AnyEntry], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write `entries` into `folder` (which exists): one file, or shards of at most `max_shard_bytes` and their index.

    A weight larger than that has a shard of its own. The index is written last: with it the folder is whole.

    Returns:
        The files written, the index included.

    Raises:
        FormatError: a block type that safetensors does not have.
        CheckpointError: a file cannot be written.
    """
    folder = Path(folder)
    shards = _shards(entries, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0])
        return [folder / SINGLE]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(entry.num_bytes for entry in entries.values())},
        "weight_map": {weight: name for name, shard in zip(names, shards, strict=True) for weight in shard},
    }
    write_json(folder / INDEX, index)
    return [*(folder / name for name in names), folder / INDEX]


def _shards(entries: Mapping[str, AnyEntry], max_shard_bytes: int) -> list[dict[str, AnyEntry]]:
    shards: list[dict[str, AnyEntry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        size = entry.num_bytes
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += size
    return shards
