"""The keys and values of a prompt in a file, so that the next process need not compute them again.

The file is in the safetensors format: `token_ids` int32 (n,), `blocks` uint8 (n / block tokens, bytes of a block) in
the layout of the KV cache, which is the same for every kernel; the metadata binds it to one model and one layout. It
holds the text of the prompt, as ids.
Left out: which blocks are whose (`cache.py`), and what is done about a file that does not fit (`cli`).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, FormatError
from minicpm.formats.atomic_file import atomic_file
from minicpm.formats.safetensors_read import SafetensorsFile, open_safetensors
from minicpm.formats.weight import Weight

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]

_FORMAT = "minicpm-prompt-cache-1"
# Rows of each tensor that a model's fingerprint reads.
_NUM_ROWS = 64


def fingerprint_model(config: ModelConfig, weights: Mapping[str, Weight]) -> str:
    """A number in hex that tells models apart: configuration, block types, and 64 rows of every tensor.

    Two models that differ in other rows only are not told apart; training and rounding change all rows.
    """
    digest = hashlib.blake2b(repr(config).encode(), digest_size=16)
    for name in sorted(weights):
        weight = weights[name]
        digest.update(f"{name} {weight.block_type} {weight.shape}".encode())
        step = -(-len(weight.data) // _NUM_ROWS)
        digest.update(np.ascontiguousarray(weight.data[::step]).data)
    return digest.hexdigest()


def write_prompt_cache(path: str | os.PathLike[str], ids: Ints, blocks: Bytes, *, model: str, layout: str) -> None:
    """Write the file whole, or leave what was there.

    Args:
        path: the file.
        ids: int32 (n,), those of whole blocks.
        blocks: uint8 (n / block tokens, block bytes).
        model: of `fingerprint_model`.
        layout: of the decoder.

    Raises:
        CheckpointError: it cannot be written.
    """
    metadata = {"format": _FORMAT, "model": model, "layout": layout, "crc32": str(_checksum(ids, blocks))}
    header = {
        "__metadata__": metadata,
        "token_ids": {"dtype": "I32", "shape": list(ids.shape), "data_offsets": [0, ids.nbytes]},
        "blocks": {
            "dtype": "U8",
            "shape": list(blocks.shape),
            "data_offsets": [ids.nbytes, ids.nbytes + blocks.nbytes],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(Path(path), 8 + len(text) + ids.nbytes + blocks.nbytes) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(ids.astype("<i4").data)
        file.write(np.ascontiguousarray(blocks).data)


def read_prompt_cache(
    path: str | os.PathLike[str], *, model: str, layout: str, block_tokens: int, block_bytes: int, vocab_size: int
) -> tuple[Ints, Bytes]:
    """Return the ids (n,) and the blocks (n / block_tokens, block_bytes), these as a view of the mapped file.

    Raises:
        FormatError: the file is something else.
        CheckpointError: it is a prompt cache, but damaged, or of another model or layout: compute the prompt anew.
    """
    if _metadata_format(Path(path)) != _FORMAT:
        raise FormatError(f"{path} is no prompt cache of this version; give another name, or remove it")
    anew = "the prompt must be computed anew"
    try:
        file = open_safetensors(path)
        ids, blocks = _array(file, "token_ids", "I32", 1), _array(file, "blocks", "U8", 2)
    except FormatError as error:
        raise CheckpointError(f"{error}; {anew}") from error
    for name, given, wanted in (("model", model, "model"), ("layout", layout, "KV cache")):
        if file.metadata.get(name) != given:
            raise CheckpointError(f"{path} is the prompt cache of another {wanted}; {anew}")
    numbers = np.frombuffer(ids.tobytes(), "<i4").astype(np.int32)
    is_whole = len(numbers) == len(blocks) * block_tokens and blocks.shape[1] == block_bytes
    is_known = bool(((numbers >= 0) & (numbers < vocab_size)).all())
    if not is_whole or not is_known or file.metadata.get("crc32") != str(_checksum(numbers, blocks)):
        raise CheckpointError(f"{path} is damaged; {anew}")
    return numbers, blocks


def _checksum(ids: Ints, blocks: Bytes) -> int:
    return zlib.crc32(np.ascontiguousarray(blocks).data, zlib.crc32(ids.astype("<i4").data))


def _metadata_format(path: Path) -> str | None:
    """What the head of the file says that it is, also when its end is missing; None for other files.

    Raises:
        FormatError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length < 1 << 16 else b""
        header = json.loads(text)
        return str(header["__metadata__"]["format"])
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError):
        return None


def _array(file: SafetensorsFile, name: str, dtype: str, num_axes: int) -> Bytes:
    """The bytes of a tensor, (n, …) for one of two axes.

    Raises:
        FormatError: it is not there, or of another kind.
    """
    place = file.tensors.get(name)
    if place is None or place.dtype != dtype or len(place.shape) != num_axes:
        raise FormatError(f"{file.path}: there is no {name} as {dtype} with {num_axes} axes")
    data = file.data[place.offset : place.offset + place.num_bytes]
    return data.reshape(place.shape) if num_axes == 2 else data
