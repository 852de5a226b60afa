"""Copying a history, or a part of it, from anywhere into a folder: resumable, every byte held to its hash.

What this leaves out: the other way round; a history is a folder of plain files that any tool can upload.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from minicpm.errors import CheckpointError
from minicpm.history.catalogue import ABOUT, INDEX, OBJECTS, Catalogue, Precision, Row
from minicpm.history.manifest import FOLDER
from minicpm.history.objects import NewObject
from minicpm.history.place import Folder, MissingFileError
from minicpm.history.reading import History
from minicpm.history.store import HistoryWriter, disk_errors
from minicpm.history.verification import needed_objects, read_pieces


def pull(
    source: History,
    path: Path,
    steps: Sequence[int],
    precision: Precision = "exact",
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> int:
    """Make `path` hold the checkpoints `steps` of `source`, besides what it holds, and return the bytes fetched.

    What is there already is not fetched again; an interrupted pull goes on where it stopped.

    Raises:
        CheckpointError: a step or precision that the source has not, a hash that differs, another history at `path`,
            or a disk that is full.
    """
    rows = [_at_precision(source.at(step, precision=precision).row, precision) for step in steps]
    sizes: dict[str, int] = dict(source.about.files.values())
    for row in rows:
        manifest = source.manifest(row)
        sizes |= {name: manifest.objects[name] for name in needed_objects(manifest, row)}
    folder = Folder(path)
    about = source.place.read(ABOUT)
    with disk_errors(path):
        for name in ("", OBJECTS, FOLDER):
            (path / name).mkdir(parents=True, exist_ok=True)
        if not (path / INDEX).exists():
            folder.write(ABOUT, about)
            folder.write(INDEX, Catalogue(hashlib.sha256(about).hexdigest(), ()).to_json())
        with HistoryWriter(path) as writer:
            if folder.read(ABOUT) != about:
                raise CheckpointError(f"{path} holds another history than {source.place.name}; name another folder")
            missing = {n: size for n, size in sizes.items() if not _is_here(folder, n, size)}
            done, total = 0, sum(missing.values())
            for name, size in missing.items():
                on_progress(source.place.name, done, total)
                _copy_object(source, folder, name, size)
                done += size
            on_progress(source.place.name, done, total)
            for row in rows:
                folder.write(row.manifest, source.place.read(row.manifest))
            known = writer.rows
            writer.replace_rows({**known, **{row.step: _better(row, known.get(row.step)) for row in rows}})
    return total


def _is_here(folder: Folder, name: str, size: int) -> bool:
    try:
        return folder.size(f"{OBJECTS}/{name}") == size
    except MissingFileError:
        return False


def _at_precision(row: Row, precision: Precision) -> Row:
    return dataclasses.replace(row, precision=precision)


def _better(row: Row, known: Row | None) -> Row:
    """Return `row`, unless the same checkpoint is here more exactly."""
    is_known = known is not None and known.manifest_sha256 == row.manifest_sha256
    return known if is_known and known is not None and known.precision == "exact" else row


def _copy_object(source: History, folder: Folder, name: str, size: int) -> None:
    new = NewObject(folder)
    try:
        for piece in read_pieces(source.place, name, size):
            new.add([piece])
        if new.digest != name:
            raise CheckpointError(f"object {name[:16]}… of {source.place.name} was changed: its hash is not its name")
        new.close()
    finally:
        new.discard()
