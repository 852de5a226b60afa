"""Where a history is copied to: a folder of this machine, or what fsspec can write; each file whole or not at all.

Objects come first and the index comes last, so nothing that is half there is ever listed. What this leaves out: reading
(`place`), what is copied (`transfer`), and the hub, which takes whole commits (`hub_destination`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from minicpm.errors import CheckpointError, MiniCPMError
from minicpm.history.catalogue import ABOUT, OBJECTS, Row
from minicpm.history.manifest import FOLDER
from minicpm.history.objects import NewObject
from minicpm.history.place import PARTIAL, Folder, Place
from minicpm.history.remote import Remote
from minicpm.history.store import disk_errors, lock_folder
from minicpm.history.verification import read_pieces

# Stores whose files appear when they are complete; elsewhere a file is written under another name and moved.
_WHOLE_PUTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}


class Destination(Protocol):
    """Files under relative names with forward slashes, to be written by one process at a time."""

    @property
    def place(self) -> Place:
        """What a reader opens."""

    def names(self) -> list[str]:
        """Return the names at the top, none where there is nothing yet."""

    def object_sizes(self) -> dict[str, int]:
        """Return the length of every object that is there."""

    def require_room(self, num_bytes: int) -> None:
        """Return if so much more fits, as far as can be known.

        Raises:
            CheckpointError: it does not.
        """

    def add_object(self, source: Place, name: str, num_bytes: int) -> None:
        """Copy an object whose hash is its name; it appears whole or not at all.

        Raises:
            CheckpointError: its hash is not its name, or it cannot be read or written.
        """

    def write(self, path: str, content: bytes) -> None:
        """Make a small file hold `content`, at once.

        Raises:
            CheckpointError: it cannot be written.
        """

    def mark(self, row: Row) -> None:
        """Give a checkpoint that is there whole a name of its own, where the place has such.

        Raises:
            CheckpointError: it cannot.
        """

    def close(self) -> None:
        """Let others write."""


class FolderDestination:
    """A folder; from the first write on it is there, and locked."""

    def __init__(self, path: Path) -> None:
        self.place = Folder(path)
        self._lock: int | None = None
        self._is_new = False

    def names(self) -> list[str]:
        """Return the names at the top."""
        return self.place.names("")

    def object_sizes(self) -> dict[str, int]:
        """Return the length of every object."""
        return {name: self.place.size(f"{OBJECTS}/{name}") for name in self.place.names(OBJECTS)}

    def require_room(self, num_bytes: int) -> None:
        """Return if so much more fits on the disk."""
        path = self.place.path.absolute()
        while not path.exists():
            path = path.parent
        free = shutil.disk_usage(path).free
        if num_bytes > free:
            raise CheckpointError(
                f"no room at {self.place.name}: {num_bytes:,} bytes are to come, {free:,} are free; make room, take "
                "fewer steps, or --precision base"
            )

    def add_object(self, source: Place, name: str, num_bytes: int) -> None:
        """Copy an object: temporary name, hash, disk, name."""
        with disk_errors(self.place.path):
            self._open()
            copy_object(source, self.place, name, num_bytes)

    def write(self, path: str, content: bytes) -> None:
        """Replace a small file."""
        with disk_errors(self.place.path):
            self._open()
            self.place.write(path, content)

    def mark(self, row: Row) -> None:
        """Return: the index names it."""

    def close(self) -> None:
        """Remove what is half-written, all of it where nothing was completed, and let others write."""
        if self._lock is None:
            return
        path = self.place.path
        for name in (".", OBJECTS, FOLDER):
            for left in (path / name).glob(f"{PARTIAL}*"):
                left.unlink(missing_ok=True)
        if self._is_new and not (path / ABOUT).exists():
            shutil.rmtree(path, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def _open(self) -> None:
        if self._lock is None:
            self._is_new = not self.place.path.exists()
            for name in (OBJECTS, FOLDER):
                (self.place.path / name).mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.place.path)


class RemoteDestination:
    """A folder of an fsspec file system.

    Raises:
        CheckpointError: fsspec does not know it, or it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.place = Remote(url)
        self._is_whole = url.partition("://")[0] in _WHOLE_PUTS

    def names(self) -> list[str]:
        """Return the names at the top."""
        return list(self._listed(""))

    def object_sizes(self) -> dict[str, int]:
        """Return the length of every object."""
        return self._listed(OBJECTS)

    def require_room(self, num_bytes: int) -> None:
        """Return: a store does not say what fits."""

    def add_object(self, source: Place, name: str, num_bytes: int) -> None:
        """Hash an object, then send it."""
        with _local_file(source, name, num_bytes) as file:
            self._send(f"{OBJECTS}/{name}", lambda files, to: files.put_file(str(file), to))

    def write(self, path: str, content: bytes) -> None:
        """Replace a small file."""
        self._send(path, lambda files, to: files.pipe_file(to, content))

    def mark(self, row: Row) -> None:
        """Return: the index names it."""

    def close(self) -> None:
        """Nothing is held."""

    def _listed(self, folder: str) -> dict[str, int]:
        root = f"{self.place.root}/{folder}".rstrip("/")

        def listed(files: Any) -> list[dict[str, Any]]:
            files.invalidate_cache()
            try:
                return list(files.ls(root, detail=True))
            except FileNotFoundError:
                return []

        entries = self._call("list", root, listed)
        found = {str(e["name"]).rstrip("/").rpartition("/")[2]: int(e.get("size") or 0) for e in entries}
        # A store without folders may list the folder itself.
        return {name: size for name, size in found.items() if name and name != root.rpartition("/")[2]}

    def _send(self, path: str, send: Callable[[Any, str], Any]) -> None:
        to = f"{self.place.root}/{path}"

        def sent(files: Any) -> None:
            if self._is_whole:
                send(files, to)
                return
            folder, _, name = to.rpartition("/")
            partial = f"{folder}/{PARTIAL}{name}"
            files.makedirs(folder, exist_ok=True)
            send(files, partial)
            files.mv(partial, to)

        self._call("write", to, sent)

    def _call(self, what: str, where: str, action: Callable[[Any], Any]) -> Any:
        try:
            return action(self.place.files)
        except MiniCPMError:
            raise
        # Every file system has its own exceptions; what they say is all that there is to tell.
        except Exception as error:
            raise CheckpointError(
                f"cannot {what} {self.place.name} ({where}): {str(error) or type(error).__name__}; what it lists is "
                "whole, and the same command goes on"
            ) from error


def copy_object(source: Place, folder: Folder, name: str, num_bytes: int) -> None:
    """Copy an object into a folder, under its name when its hash is that.

    Raises:
        CheckpointError: it is another, or cannot be read.
        OSError: the disk does not take it.
    """
    new = NewObject(folder)
    try:
        for piece in read_pieces(source, name, num_bytes):
            new.add([piece])
        if new.digest != name:
            raise CheckpointError(f"object {name[:16]}… of {source.name} was changed: its hash is not its name")
        new.close()
    finally:
        new.discard()


def open_destination(path_or_url: str, make_model: Callable[[Row, Path], None] | None = None) -> Destination:
    """Return where a path or URL says; nothing is written yet.

    Args:
        path_or_url: where.
        make_model: of the hub: makes what a checkpoint's revision holds besides; see `hub_destination`.

    Raises:
        CheckpointError: a URL that cannot be written, or not be reached.
    """
    scheme, separator, rest = path_or_url.partition("://")
    if not separator or scheme == "file":
        return FolderDestination(Path(rest if separator else path_or_url).expanduser())
    if scheme in ("http", "https"):
        raise CheckpointError(
            f"{path_or_url} is for reading; publish into a folder that the server shows, or to a store such as s3://"
        )
    if scheme == "hf":
        from minicpm.history.hub_destination import HubDestination

        return HubDestination(path_or_url, make_model)
    return RemoteDestination(path_or_url)


@contextlib.contextmanager
def _local_file(source: Place, name: str, num_bytes: int) -> Iterator[Path]:
    """Give a local file with an object's content, held to its hash."""
    with tempfile.TemporaryDirectory(prefix="minicpm-publish-") as temporary:
        folder = Folder(Path(temporary))
        with disk_errors(folder.path):
            (folder.path / OBJECTS).mkdir()
            copy_object(source, folder, name, num_bytes)
        yield folder.path / OBJECTS / name
