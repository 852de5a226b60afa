"""Writing immutable objects: files that are named by the SHA-256 of their content.

An object is written under a temporary name, reaches the disk, and is renamed to its hash. What this leaves out:
reading them (`decoding`) and deleting those that nothing needs any more (`thinning`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from minicpm.history.catalogue import OBJECTS
from minicpm.history.manifest import Extent
from minicpm.history.place import PARTIAL, Folder, write_all

# Until an object is whole, its extents name it so.
UNNAMED = ""


class NewObject:
    """An object that is being written, piece by piece; `close` names it, `discard` forgets it."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._path = folder.path / OBJECTS / f"{PARTIAL}{os.urandom(6).hex()}"
        self._file: int | None = None
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def add(self, pieces: Sequence[bytes]) -> Extent:
        """Append `pieces` and return where they lie.

        Raises:
            OSError: the disk does not take them.
        """
        extent = Extent(UNNAMED, self.num_bytes, tuple(map(len, pieces)))
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        content = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        write_all(self._file, content)
        self._hash.update(content)
        self.num_bytes += len(content)
        return extent

    @property
    def digest(self) -> str:
        """The hash of what was written so far."""
        return self._hash.hexdigest()

    def close(self) -> str | None:
        """Make the object reach the disk under its name; return its hash, None if nothing was written.

        Raises:
            OSError: the disk does not take it.
        """
        if self._file is None:
            return None
        os.fsync(self._file)
        self._close_file()
        name = self.digest
        self._folder.rename(self._path, f"{OBJECTS}/{name}")
        return name

    def discard(self) -> None:
        """Remove what was written, unless `close` has named it."""
        self._close_file()
        self._path.unlink(missing_ok=True)

    def _close_file(self) -> None:
        if self._file is not None:
            descriptor, self._file = self._file, None
            os.close(descriptor)


def write_object(folder: Folder, content: bytes) -> str:
    """Write one object as a whole and return its hash.

    Raises:
        OSError: the disk does not take it.
    """
    name = hashlib.sha256(content).hexdigest()
    folder.write(f"{OBJECTS}/{name}", content)
    return name
