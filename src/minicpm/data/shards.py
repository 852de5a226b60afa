"""Tokenized documents on disk: a folder of memory-mapped shards that is whole or absent.

    manifest.json        written last: its presence means complete
    tokens-00000.bin     the ids of whole documents, little-endian uint16 or uint32; bos and eos stand in place
    supervised-00000.bin only with supervised rows: one byte per token, 1 where the token is a target
    documents.npy        int64 (documents + 1): where each document begins, counted over all shards
    text_bytes.npy       int64 (documents): UTF-8 bytes of each document's text, for bits per byte

What this leaves out: writing them (`shard_writer`), making the ids (`tokenization`), cutting rows (`packing`).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpm.errors import DataError

FORMAT = "minicpm-tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_FIELDS = ("dtype", "shards", "num_documents", "num_tokens", "tokenizer_hash", "is_supervised", "content_hash")


@dataclass(frozen=True)
class TokenShards:
    """A folder of tokenized documents, opened for reading. Safe to share between threads.

    Attributes:
        path: the folder.
        manifest: what `manifest.json` holds.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path, tokenizer_hash: str | None = None) -> TokenShards:
        """Return the shards in folder `path`, their sizes checked.

        Args:
            path: the folder.
            tokenizer_hash: what `tokenizer.fingerprint` says of the tokenizer in use; None skips the check.

        Raises:
            DataError: there is no manifest, it is of another format, a file is missing or has the wrong size, or the
                ids were made with another tokenizer.
        """
        manifest = read_manifest(path)
        if tokenizer_hash is not None and manifest["tokenizer_hash"] != tokenizer_hash:
            raise DataError(
                f"{path} was tokenized with another tokenizer ({manifest['tokenizer_hash'][:12]}, this one is "
                f"{tokenizer_hash[:12]}); tokenize it again with `minicpm data tokenize` or name its own tokenizer"
            )
        shards = cls(path, manifest)
        shards._check_sizes()
        return shards

    @property
    def num_documents(self) -> int:
        """The number of documents."""
        return int(self.manifest["num_documents"])

    @property
    def num_tokens(self) -> int:
        """The number of ids, bos and eos included."""
        return int(self.manifest["num_tokens"])

    @property
    def is_supervised(self) -> bool:
        """Whether only some tokens are targets."""
        return bool(self.manifest["is_supervised"])

    @functools.cached_property
    def bounds(self) -> NDArray[np.int64]:
        """Where each document begins, and at the end where the last one stops; (documents + 1)."""
        return load_array(self.path / "documents.npy", self.num_documents + 1)

    @functools.cached_property
    def text_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each document's text; (documents)."""
        return load_array(self.path / "text_bytes.npy", self.num_documents)

    def tokens(self, start: int, stop: int) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Return the ids in [start, stop), which must lie within one document; a view of the file."""
        return self._slice(self._token_maps, start, stop)

    def supervised(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return 1 for each token in [start, stop) that is a target; only where `is_supervised`."""
        return self._slice(self._supervised_maps, start, stop)

    def document(self, index: int) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Return the ids of one document.

        Raises:
            DataError: there is no such document.
        """
        if not 0 <= index < self.num_documents:
            raise DataError(f"{self.path} has documents 0 to {self.num_documents - 1}, not {index}")
        return self.tokens(int(self.bounds[index]), int(self.bounds[index + 1]))

    @functools.cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(shard["num_tokens"] for shard in self.manifest["shards"])], dtype=np.int64)

    @functools.cached_property
    def _token_maps(self) -> list[NDArray[Any]]:
        names = [self.path / shard["tokens"] for shard in self.manifest["shards"]]
        return [np.memmap(name, dtype=self.manifest["dtype"], mode="r") for name in names]

    @functools.cached_property
    def _supervised_maps(self) -> list[NDArray[Any]]:
        names = [self.path / shard["supervised"] for shard in self.manifest["shards"]]
        return [np.memmap(name, dtype="uint8", mode="r") for name in names]

    def _slice(self, maps: list[NDArray[Any]], start: int, stop: int) -> NDArray[Any]:
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        offset = int(self._starts[shard])
        return maps[shard][start - offset : stop - offset]

    def _check_sizes(self) -> None:
        width = np.dtype(self.manifest["dtype"]).itemsize
        total = 0
        for shard in self.manifest["shards"]:
            sizes = {shard["tokens"]: width} | ({shard["supervised"]: 1} if self.is_supervised else {})
            for name, item_bytes in sizes.items():
                expected = shard["num_tokens"] * item_bytes
                file = self.path / name
                found = file.stat().st_size if file.is_file() and Path(name).name == name else -1
                if found != expected:
                    is_there = f"has {found} bytes" if found >= 0 else "is missing"
                    raise DataError(f"{file} {is_there}, its manifest says {expected}; tokenize the text again")
            total += shard["num_tokens"]
        if total != self.num_tokens or self.bounds[0] != 0 or self.bounds[-1] != total:
            raise DataError(f"{self.path}: the document index does not fit the shards; tokenize the text again")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the shards in folder `path`.

    Raises:
        DataError: it is missing, broken, or of another format or version.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} holds no token shards ({MANIFEST}: {error.strerror}); see `data tokenize`") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}; tokenize the text again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{file} is not the manifest of token shards; `data tokenize` makes them")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{file} has format version {manifest.get('format_version')}; this program reads {FORMAT_VERSION}"
        )
    missing = [name for name in _FIELDS if name not in manifest]
    if missing or manifest["dtype"] not in {"<u2", "<u4"}:
        raise DataError(f"{file}: {missing[0] if missing else 'dtype'} is missing or wrong; tokenize the text again")
    return manifest


def load_array(file: Path, size: int) -> NDArray[Any]:
    """Return the one-dimensional integer array in a `.npy` file, mapped, not read.

    Raises:
        DataError: the file is missing, broken, or holds another number of items.
    """
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {file}: {error}; tokenize the text again") from error
    if array.shape != (size,) or array.dtype.kind not in "iu":
        raise DataError(f"{file} holds an array of {array.shape}, expected {size} integers; tokenize the text again")
    return array
