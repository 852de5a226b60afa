"""Writes token shards; see `shards` for the layout. What this leaves out: the temporary folder (`atomic`)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from minicpm.data.atomic import flush
from minicpm.data.shards import FORMAT, FORMAT_VERSION, MANIFEST
from minicpm.errors import DataError

SHARD_TOKENS = 1 << 28


class ShardWriter:
    """Writes documents into a (temporary) folder; `finish` writes the manifest."""

    def __init__(self, folder: Path, vocab_size: int, *, is_supervised: bool = False, shard_tokens: int = SHARD_TOKENS):
        """Begin the first shard.

        Args:
            folder: where; see `atomic.new_folder`.
            vocab_size: of the tokenizer; up to 65,536 ids fit uint16.
            is_supervised: whether each document comes with a mask.
            shard_tokens: a shard ends with the document that reaches it.
        """
        self._folder = folder
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._is_supervised = is_supervised
        self._shard_tokens = shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._files: list[IO[bytes]] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._text_bytes: list[NDArray[np.int64]] = []
        self._hash, self._mask_hash = hashlib.sha256(), hashlib.sha256()
        self.num_tokens = 0
        self.num_documents = 0

    def add(
        self,
        ids: NDArray[Any],
        lengths: NDArray[np.int64],
        text_bytes: NDArray[np.int64],
        supervised: NDArray[np.uint8] | None = None,
    ) -> None:
        """Append documents: their ids one after another, the length of each, and the bytes of each text."""
        data = ids.astype(self._dtype, copy=False)
        self._hash.update(data.tobytes())
        ends = np.cumsum(lengths)
        done = document = 0
        while document < len(lengths):
            room = self._shard_tokens - (self._shards[-1]["num_tokens"] if self._files else 0)
            # Whole documents only: the one that reaches the limit is the shard's last.
            last = min(int(np.searchsorted(ends, done + room)), len(lengths) - 1)
            stop = int(ends[last])
            self._append(data[done:stop], None if supervised is None else supervised[done:stop])
            done, document = stop, last + 1
        self._lengths.append(lengths)
        self._text_bytes.append(text_bytes)
        self.num_tokens += len(data)
        self.num_documents += len(lengths)

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write indices and manifest, and return the manifest.

        Raises:
            DataError: not a single document was added.
        """
        self.close()
        if not self.num_documents:
            raise DataError("the corpus is empty: no document has text")
        lengths = np.concatenate(self._lengths)
        arrays = {
            "documents.npy": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "text_bytes.npy": np.concatenate(self._text_bytes).astype(np.int64),
        }
        for name, array in arrays.items():
            with (self._folder / name).open("wb") as file:
                np.save(file, array, allow_pickle=False)
                flush(file)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dtype": f"<u{self._dtype.itemsize}",
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "text_bytes": int(arrays["text_bytes.npy"].sum()),
            "longest_document_tokens": int(lengths.max()),
            "is_supervised": self._is_supervised,
            "content_hash": hashlib.sha256(self._hash.digest() + self._mask_hash.digest()).hexdigest(),
            "shards": self._shards,
            **facts,
        }
        with (self._folder / MANIFEST).open("wb") as file:
            file.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode())
            flush(file)
        return manifest

    def close(self) -> None:
        """Flush and close the open shard."""
        for file in self._files:
            flush(file)
            file.close()
        self._files = []

    def _append(self, ids: NDArray[Any], supervised: NDArray[np.uint8] | None) -> None:
        if not self._files:
            number = len(self._shards)
            shard: dict[str, Any] = {"tokens": f"tokens-{number:05}.bin", "num_tokens": 0}
            if self._is_supervised:
                shard["supervised"] = f"supervised-{number:05}.bin"
            self._shards.append(shard)
            names = [shard[key] for key in ("tokens", "supervised") if key in shard]
            self._files = [(self._folder / name).open("wb") for name in names]
        self._files[0].write(ids.tobytes())
        if supervised is not None:
            self._files[1].write(supervised.astype(np.uint8).tobytes())
            self._mask_hash.update(supervised.astype(np.uint8).tobytes())
        self._shards[-1]["num_tokens"] += len(ids)
        if self._shards[-1]["num_tokens"] >= self._shard_tokens:
            self.close()
