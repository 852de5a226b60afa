"""`map_file`: the bytes of a file without reading them; `release`: their memory given back once they were read.

What this leaves out: files that others shorten while they are mapped, which no program can read safely; ours are
replaced as a whole, never written in place.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import numpy as np

from minicpm.errors import FormatError
from minicpm.formats.block_type import Bytes


def map_file(path: Path) -> Bytes:
    """Return the bytes of a regular file as a read-only array, uint8 (size,), that is backed by the file.

    Raises:
        FormatError: the file is missing, unreadable, empty, or no regular file (a pipe would block for ever).
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{path} is not a regular file")
            if not status.st_size:
                raise FormatError(f"{path} is empty")
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error


def is_mapped(array: Bytes) -> bool:
    """Return whether `array` is a view of a mapped file, so that its memory can be given back at any time."""
    return _mapping(array) is not None


def release(array: Bytes) -> None:
    """Give back the memory of a view of a mapped file (reading brings it back); any other array stays as it is."""
    mapping = _mapping(array)
    if mapping is None or not hasattr(mapping, "madvise"):
        return
    start = array.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


def release_file(array: Bytes) -> None:
    """Give back the memory of all of the file that `array` is a view of; reading brings it back."""
    mapping = _mapping(array)
    if mapping is not None and hasattr(mapping, "madvise"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _mapping(array: Bytes) -> mmap.mmap | None:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    mapping = base.obj if isinstance(base, memoryview) else None
    return mapping if isinstance(mapping, mmap.mmap) else None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
