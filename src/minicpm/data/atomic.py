"""Files and folders that appear whole or not at all.

A folder is written under a temporary name beside its final one, flushed to the disk, and renamed; its manifest is
written last, so that a manifest means a whole folder even where the rename was not ours. What this leaves out: several
writers of one name (the last rename wins for files, the first for folders).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from minicpm.errors import DataError


@contextmanager
def new_folder(path: Path, *, replaces: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and is removed when it does not.

    Args:
        path: the final name.
        replaces: whether a folder that is there already may be replaced.

    Raises:
        DataError: `path` exists and may not be replaced, or the disk refuses.
    """
    if path.exists() and not replaces:
        raise DataError(f"{path} exists already; choose another name or remove it first")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        flush_folder(temporary)
        if replaces and path.exists():
            # A rename cannot replace a folder with something in it.
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(path)
        flush_folder(path.parent)
    except OSError as error:
        raise _disk_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file open for writing that becomes `path` when the block ends well.

    Raises:
        DataError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            flush(file)
        temporary.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        raise _disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path`, whole or not at all."""
    with new_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def flush(file: IO[bytes]) -> None:
    """Wait until what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; the rename is all that they offer.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


def _disk_error(path: Path, error: OSError) -> DataError:
    hint = "; free some space and run it again" if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
    return DataError(f"cannot write {path}: {error.strerror or error}{hint}; nothing was left half written")
