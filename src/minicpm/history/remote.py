"""A history behind any URL that fsspec knows: s3://, gs://, hf://, memory:// …, for reading.

What this leaves out: credentials, which each of fsspec's file systems takes from its own settings, and writing
(`destination`): a history is written in a folder and copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minicpm.errors import CheckpointError
from minicpm.history.place import MissingFileError, cut_short
from minicpm.history.web import cut_ranges, merge_ranges


class Remote:
    """A folder of an fsspec file system: `root` below `files`."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        scheme = url.partition("://")[0]
        try:
            import fsspec
        except ImportError as error:
            raise CheckpointError(
                f"{url} is read through fsspec, which is not installed: pip install 'minicpm[remote]'"
            ) from error
        try:
            self.files, self.root = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"{scheme}:// cannot be opened: {error}") from error
        except OSError as error:
            raise CheckpointError(
                f"cannot reach {url}: {error.strerror or error}; check the address and the network"
            ) from error

    @property
    def name(self) -> str:
        """The URL."""
        return self._url

    def read(self, path: str) -> bytes:
        """Return a whole small file."""
        return bytes(self._call(path, lambda name: self.files.cat_file(name)))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return the bytes of every range."""
        merged = merge_ranges(ranges)
        contents = [
            self._call(path, lambda name, f=first, n=length: self.files.cat_file(name, start=f, end=f + n))
            for path, first, length in merged
        ]
        for (path, first, length), content in zip(merged, contents, strict=True):
            if len(content) < length:
                raise cut_short(f"{self._url}/{path}", first, length, len(content))
        return cut_ranges(ranges, merged, contents)

    def size(self, path: str) -> int:
        """Return a file's length."""
        return int(self._call(path, lambda name: self.files.size(name)))

    def _call(self, path: str, read: Any) -> Any:
        where = f"{self._url}/{path}"
        try:
            return read(f"{self.root}/{path}")
        except FileNotFoundError as error:
            raise MissingFileError(f"{where} is missing") from error
        # Every file system has its own exceptions; what they say is all that there is to tell.
        except Exception as error:
            raise CheckpointError(f"cannot read {where}: {str(error) or type(error).__name__}") from error
