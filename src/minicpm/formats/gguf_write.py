"""Our own GGUF writer: version 3, little endian; the header first, then one tensor at a time, atomically.

`write_gguf` writes any keys and tensors; `write_gguf_model` writes a model: GGUF names, q and k rows permuted,
vectors in F32, every scale. What this leaves out: rounding (weights arrive in their block type) and splitting into
several files.

Source: the GGUF specification (ggml `docs/gguf.md`).
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, FormatError
from minicpm.formats import names
from minicpm.formats.atomic_file import atomic_file
from minicpm.formats.blocks import block_type
from minicpm.formats.gguf_config import config_to_gguf
from minicpm.formats.gguf_metadata import ARRAY, SCALAR_TYPES, STRING
from minicpm.formats.gguf_read import MAGIC, MAX_DIMENSIONS
from minicpm.formats.mapped_file import release
from minicpm.formats.rope_factors import RAMPS, ROPE_TENSOR, frequency_divisors
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry

DEFAULT_ALIGNMENT = 32
_TYPE_OF_DTYPE = {np.dtype(dtype): number for number, (_, dtype) in SCALAR_TYPES.items()}
_DTYPE = {name: np.dtype(dtype) for name, dtype in SCALAR_TYPES.values()}
# What llama.cpp calls a file after its commonest matrix type (`llama_ftype`).
_FILE_TYPES: Mapping[str, int] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18,
    "BF16": 32,
}  # fmt: skip


def write_gguf(path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Mapping[str, WeightEntry]) -> None:
    """Write a file with `metadata` and `tensors`, both in the given order; at most one tensor is alive at a time.

    Python ints become UINT32 (INT32 if negative, 64 bits if they must), those in lists INT32; floats become FLOAT32;
    numpy scalars and arrays keep their type.

    Raises:
        FormatError: a value or tensor that GGUF cannot hold.
        CheckpointError: the file cannot be written; nothing is left behind.
    """
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise FormatError(f"general.alignment must be a power of two, got {alignment!r}")
    pairs = b"".join(_string(key) + _value(key, value) for key, value in metadata.items())
    table, offset = [], 0
    for name, entry in tensors.items():
        table.append(_tensor_entry(name, entry, offset))
        offset += _padded(entry.num_bytes, alignment)
    head = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + pairs + b"".join(table)
    head += bytes(_padded(len(head), alignment) - len(head))
    with atomic_file(Path(path), len(head) + offset) as file:
        file.write(head)
        for name, entry in tensors.items():
            _write_tensor(file, name, entry, alignment)


def write_gguf_model(
    path: str | os.PathLike[str],
    config: ModelConfig,
    entries: Mapping[str, WeightEntry],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a whole model as one GGUF file of the architecture `config.model_type`.

    Args:
        path: the file.
        config: its keys win over equal ones in `metadata`.
        entries: every weight under its HF name, in HF row order, in the block type to write; vectors become F32.
        metadata: tokenizer and general keys, such as those of another GGUF; other keys of it are left out.

    Raises:
        ConfigError: the architecture's GGUF cannot express `config`.
        FormatError: a weight without a GGUF name, or a value that GGUF cannot hold.
        CheckpointError: the file cannot be written; nothing is left behind.
    """
    tensors = {}
    if config.rope_scaling is not None and config.rope_scaling.rope_type in RAMPS:
        divisors = Weight.from_array(frequency_divisors(config))
        tensors[ROPE_TENSOR] = WeightEntry(divisors.shape, "F32", lambda: divisors)
    for name, entry in entries.items():
        theirs = names.translate(name, names.HF_TO_GGUF)
        if theirs is None:
            raise FormatError(f"the weight {name!r} has no name in GGUF")
        tensors[theirs] = _for_gguf(name, entry, config)
    types = Counter(entry.block_type for entry in entries.values() if len(entry.shape) > 1)
    described = config_to_gguf(config)
    kept = {key: value for key, value in (metadata or {}).items() if key.startswith(("general.", "tokenizer."))}
    # llama.cpp wants the architecture first; the alignment of another file means nothing here.
    kept.pop("general.alignment", None)
    for key in ("eos_token_id", "eot_token_id", "eom_token_id"):
        kept.pop(f"tokenizer.ggml.{key}", None)
    kept["general.file_type"] = _FILE_TYPES[types.most_common(1)[0][0]] if types else 0
    if any(block_type(name).block_size > 1 for name in types):
        kept["general.quantization_version"] = 2
    write_gguf(path, {"general.architecture": config.model_type, "general.type": "model"} | kept | described, tensors)


def _for_gguf(name: str, entry: WeightEntry, config: ModelConfig) -> WeightEntry:
    num_heads = names.rotated_heads(name, config)
    if num_heads:
        order = names.interleaved_order(num_heads, config.head_dim)
        return WeightEntry(entry.shape, entry.block_type, lambda: entry.make().take_rows(order))
    if len(entry.shape) == 1 and entry.block_type != "F32":
        return WeightEntry(entry.shape, "F32", lambda: entry.make().encode("F32"))
    return entry


def _padded(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment


def _tensor_entry(name: str, entry: WeightEntry, offset: int) -> bytes:
    if not 1 <= len(entry.shape) <= MAX_DIMENSIONS:
        raise FormatError(f"the tensor {name!r} has shape {entry.shape}; GGUF holds 1 to {MAX_DIMENSIONS} dimensions")
    dimensions = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
    return _string(name) + dimensions + struct.pack("<IQ", block_type(entry.block_type).ggml_id, offset)


def _write_tensor(file: BinaryIO, name: str, entry: WeightEntry, alignment: int) -> None:
    weight = entry.make()
    if weight.shape != entry.shape or weight.block_type != entry.block_type:
        raise CheckpointError(
            f"{name} was announced as {entry.block_type} {entry.shape} and came as {weight.block_type} {weight.shape}"
        )
    file.write(np.ascontiguousarray(weight.data).data)
    release(weight.data)
    file.write(bytes(_padded(weight.num_bytes, alignment) - weight.num_bytes))


def _string(text: str) -> bytes:
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{text[:40]!r} cannot be written as UTF-8: {error.reason}") from error
    return struct.pack("<Q", len(encoded)) + encoded


def _value(key: str, value: Any) -> bytes:
    """Return the type number and the value, as they stand in the file."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, np.ndarray | list | tuple):
        return struct.pack("<I", ARRAY) + _array(key, value)
    number, encoded = _numbers(key, [value], "UINT32")
    return struct.pack("<I", number) + encoded


def _array(key: str, items: Any) -> bytes:
    if isinstance(items, np.ndarray):
        number, encoded = _numbers(key, items.reshape(-1), "INT32")
    elif (items and all(isinstance(item, str) for item in items)) or not items:
        number, encoded = STRING, b"".join(map(_string, items))
    elif all(isinstance(item, list | tuple) for item in items):
        number, encoded = ARRAY, b"".join(_array(key, item) for item in items)
    else:
        number, encoded = _numbers(key, items, "INT32")
    return struct.pack("<IQ", number, len(items)) + encoded


def _numbers(key: str, items: Any, integer: str) -> tuple[int, bytes]:
    """Return the type number and the bytes of numbers of one kind; `integer` is the type that ints prefer."""
    dtype = items.dtype if isinstance(items, np.ndarray) else None
    if dtype is None:
        kinds = {type(item) for item in items}
        first = items[0]
        if isinstance(first, np.generic) and kinds == {type(first)}:
            dtype = first.dtype
        elif kinds == {bool}:
            dtype = _DTYPE["BOOL"]
        elif kinds == {int}:
            dtype = _integer_dtype(key, items, integer)
        elif kinds <= {int, float}:
            dtype = _DTYPE["FLOAT32"]
        else:
            raise FormatError(f"the metadata key {key!r} holds {first!r}; GGUF holds text, numbers, lists")
    little = dtype.newbyteorder("<")
    if little not in _TYPE_OF_DTYPE:
        raise FormatError(f"the metadata key {key!r} has dtype {dtype}, which GGUF does not know")
    with np.errstate(over="ignore"):
        array = np.asarray(items, little)
    return _TYPE_OF_DTYPE[little], array.tobytes()


def _integer_dtype(key: str, items: Any, preferred: str) -> np.dtype[Any]:
    low, high = min(items), max(items)
    for name in (preferred, "UINT32", "INT32", "INT64", "UINT64"):
        limits = np.iinfo(_DTYPE[name])
        if limits.min <= low and high <= limits.max:
            return _DTYPE[name]
    raise FormatError(f"the metadata key {key!r} holds {low} to {high}; GGUF holds at most 64 bits")
