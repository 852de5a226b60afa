"""`atomic_file`: a file that appears under its name only when it is whole and on the disk.

What this leaves out: folders (whoever writes several files renames their folder).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from minicpm.errors import CheckpointError


@contextlib.contextmanager
def atomic_file(path: Path, num_bytes: int = 0) -> Iterator[BinaryIO]:
    """Give a binary file to write; after the block `path` holds what was written, with the mode that the umask gives.

    On any failure the partial file is gone and whatever `path` held before is untouched.

    Args:
        path: the final name; its folder must exist.
        num_bytes: what will be written, if known: too little free space is then said before the work.

    Raises:
        CheckpointError: no space, no folder, no permission.
    """
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        _check_free_space(path, num_bytes)
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def _check_free_space(path: Path, num_bytes: int) -> None:
    if num_bytes and hasattr(os, "statvfs"):
        status = os.statvfs(path.parent)
        free = status.f_bavail * status.f_frsize
        if num_bytes > free:
            raise CheckpointError(
                f"cannot write {path}: it takes {num_bytes / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free"
            )


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk; systems that cannot sync a folder do so on their own.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
