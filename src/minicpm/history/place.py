"""Where a history lies: a folder, or a URL; files read whole or by range, written whole or not at all.

    open_place("runs/nano/history")  a folder; written by temporary name, fsync, rename
    open_place("https://…")          a static file server that answers range requests (`web`)
    open_place("s3://…", "hf://…")   whatever fsspec knows (`remote`; the extra "remote")

What this leaves out: what the files mean (`manifest`, `catalogue`).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from minicpm.errors import CheckpointError

PARTIAL = ".partial-"
# Metadata larger than this is no history's.
MAX_TEXT_BYTES = 256 << 20


class MissingFileError(CheckpointError):
    """A file that the history names is not there."""


class Place(Protocol):
    """Files under relative names with forward slashes."""

    @property
    def name(self) -> str:
        """What to call it in a message."""

    def read(self, path: str) -> bytes:
        """Return a whole small file.

        Raises:
            MissingFileError: it is not there.
            CheckpointError: it cannot be read.
        """

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return the bytes of every (path, first byte, length), all of them whole.

        Raises:
            MissingFileError: a file is not there.
            CheckpointError: it is shorter, or cannot be read.
        """

    def size(self, path: str) -> int:
        """Return a file's length in bytes.

        Raises:
            MissingFileError: it is not there.
        """


class Folder:
    """A folder of this machine; the only place that is written to directly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self.path)

    def read(self, path: str) -> bytes:
        """Return a whole file."""
        try:
            with (self.path / path).open("rb") as file:
                return file.read(MAX_TEXT_BYTES)
        except OSError as error:
            raise _unreadable(self.path / path, error) from error

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return the bytes of every range."""
        found: list[bytes] = []
        with contextlib.ExitStack() as stack:
            files: dict[str, int] = {}
            for path, first, length in ranges:
                try:
                    if path not in files:
                        files[path] = os.open(self.path / path, os.O_RDONLY)
                        stack.callback(os.close, files[path])
                    content = _read_at(files[path], first, length)
                except OSError as error:
                    raise _unreadable(self.path / path, error) from error
                if len(content) < length:
                    raise cut_short(f"{self.path / path}", first, length, len(content))
                found.append(content)
        return found

    def size(self, path: str) -> int:
        """Return a file's length."""
        try:
            return (self.path / path).stat().st_size
        except OSError as error:
            raise _unreadable(self.path / path, error) from error

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in `folder`, none if it is not there; half-written ones too."""
        try:
            return sorted(os.listdir(self.path / folder))
        except FileNotFoundError:
            return []

    def write(self, path: str, content: bytes) -> None:
        """Make `path` hold `content`, whole or not at all, and reach the disk.

        Raises:
            OSError: the disk does not take it; what was there before is untouched.
        """
        target = self.path / path
        partial = target.with_name(f"{PARTIAL}{os.urandom(6).hex()}")
        try:
            with partial.open("xb", buffering=0) as file:
                write_all(file.fileno(), content)
                os.fsync(file.fileno())
            self.rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def rename(self, partial: Path, path: str) -> None:
        """Give a file that has reached the disk its name, and make the name reach the disk."""
        target = self.path / path
        partial.replace(target)
        sync_folder(target.parent)

    def remove(self, path: str) -> None:
        """Delete a file if it is there."""
        (self.path / path).unlink(missing_ok=True)


def open_place(path_or_url: str | os.PathLike[str]) -> Place:
    """Return the place that a path or URL names; nothing is read yet.

    Raises:
        CheckpointError: a URL that needs fsspec where it is not installed.
    """
    text = os.fspath(path_or_url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Folder(Path(text).expanduser())
    if scheme == "file":
        return Folder(Path(rest))
    if scheme in ("http", "https"):
        from minicpm.history.web import Web

        return Web(text)
    from minicpm.history.remote import Remote

    return Remote(text)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of `content` to an open file.

    Raises:
        OSError: the disk does not take it.
    """
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; the rename is all that they offer.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def cut_short(where: str, first: int, length: int, got: int) -> CheckpointError:
    """Return the error for a file that ends too early."""
    return CheckpointError(f"{where} is truncated: {length} bytes at {first} were asked for, {got} came")


def _read_at(descriptor: int, first: int, length: int) -> bytes:
    # The length comes from a file that may lie: never allocate more than is there.
    available = max(0, min(length, os.fstat(descriptor).st_size - first))
    pieces: list[bytes] = []
    while available > 0:
        piece = os.pread(descriptor, available, first)
        if not piece:
            break
        pieces.append(piece)
        first += len(piece)
        available -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MissingFileError(f"{path} is missing")
    return CheckpointError(f"cannot read {path}: {error.strerror or error}")
