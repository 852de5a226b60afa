"""Writing a history: one process at a time appends checkpoints to a folder.

The order of every append is objects, manifest, index, each made to reach the disk before the next; what a crash leaves
behind is never listed. Readers need no lock: they see the index before or after. What this leaves out: reading
(`reading`), thinning (`thinning`) and writing beside a running training (`background`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from minicpm.errors import CheckpointError
from minicpm.formats.weight import Weight
from minicpm.history import coding
from minicpm.history.catalogue import ABOUT, INDEX, OBJECTS, About, Catalogue, Row, read_catalogue, row_of
from minicpm.history.encoding import Encoder
from minicpm.history.manifest import FOLDER, Facts, Manifest, parse_manifest
from minicpm.history.objects import write_object
from minicpm.history.place import PARTIAL, Folder

_LOCK = ".lock"


class StepExistsError(CheckpointError):
    """The history has a checkpoint of this step, with other weights."""


class HistoryWriter:
    """Appends checkpoints to the history in a folder, which it makes if there is none.

    Args:
        path: the folder.
        about: what the history is of; None opens one that is there.
        files: small files that make a checkpoint a model folder, such as tokenizer.json.

    Raises:
        CheckpointError: the folder holds something else, another run's history, or another process writes it.
    """

    def __init__(self, path: Path, about: About | None = None, files: Mapping[str, bytes] | None = None) -> None:
        self.folder = Folder(path)
        with disk_errors(path):
            if about is not None:
                for name in ("", OBJECTS, FOLDER):
                    (path / name).mkdir(parents=True, exist_ok=True)
            self._lock: int | None = lock_folder(path)
            try:
                for name in (".", OBJECTS, FOLDER):
                    for left in (path / name).glob(f"{PARTIAL}*"):
                        left.unlink(missing_ok=True)
                if about is not None and not (path / INDEX).exists():
                    self._create(about, files or {})
                self.about, self.catalogue = read_catalogue(self.folder)
                if about is not None:
                    _check_same(about, self.about, path)
            except BaseException:
                self.close()
                raise
        self.encoder = Encoder(self.folder, self.about)

    def __enter__(self) -> HistoryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def rows(self) -> dict[int, Row]:
        """The checkpoints by step."""
        return {row.step: row for row in self.catalogue.rows}

    def _create(self, about: About, files: Mapping[str, bytes]) -> None:
        entries = {name: (write_object(self.folder, content), len(content)) for name, content in files.items()}
        text = dataclasses.replace(about, files=entries).to_json()
        self.folder.write(ABOUT, text)
        self.folder.write(INDEX, Catalogue(hashlib.sha256(text).hexdigest(), ()).to_json())

    def manifest(self, step: int) -> Manifest:
        """Return the manifest of a step that is there."""
        row = self.rows[step]
        return parse_manifest(self.folder.read(row.manifest), f"{self.folder.name}/{row.manifest}")

    def append(self, facts: Facts, weights: Mapping[str, Weight]) -> Row:
        """Add the checkpoint of `facts.step`; the same one again is no error and changes nothing.

        Each weight is asked for once. Steps need not come in order.

        Raises:
            CheckpointError: the history has another checkpoint of this step, a weight is no float tensor, or the disk
                does not take it; the history is as it was then.
        """
        expected = self.about.config.weight_shapes()
        if set(weights) != set(expected):
            wrong = ", ".join(sorted(set(weights) ^ set(expected))[:5])
            raise CheckpointError(f"step {facts.step}: the tensors do not fit the history's model: {wrong}")
        with disk_errors(self.folder.path):
            known = self.rows.get(facts.step)
            if known is not None:
                self._check_equal(facts.step, weights)
                return known
            manifest, num_bytes = self.encoder.encode(facts, weights, self._manifest_before(facts.step))
            row = self.write_manifest(manifest, num_bytes)
            self.replace_rows({**self.rows, row.step: row})
        return row

    def _manifest_before(self, step: int) -> Manifest | None:
        earlier = [row.step for row in self.catalogue.rows if row.step < step and row.precision == "exact"]
        return self.manifest(earlier[-1]) if earlier else None

    def _check_equal(self, step: int, weights: Mapping[str, Weight]) -> None:
        for name, entry in self.manifest(step).tensors.items():
            if coding.digest(weights[name].data) != entry.sha256:
                raise StepExistsError(
                    f"{self.folder.name} has a checkpoint of step {step} with another {name}; write into another folder"
                )

    def write_manifest(self, manifest: Manifest, num_bytes: int) -> Row:
        """Write a manifest, which nothing lists yet, and return its row.

        Raises:
            OSError: the disk does not take it.
        """
        text = manifest.to_json()
        row = row_of(manifest, text, num_bytes)
        self.folder.write(row.manifest, text)
        return row

    def replace_rows(self, rows: Mapping[int, Row]) -> None:
        """Make the index list these rows: the moment at which a change takes place.

        Raises:
            OSError: the disk does not take it; the index is as it was.
        """
        catalogue = self.catalogue.with_rows(rows)
        self.folder.write(INDEX, catalogue.to_json())
        self.catalogue = catalogue

    def drop_after(self, step: int) -> list[int]:
        """Stop listing the checkpoints after `step`, published ones excepted, and return their steps.

        Raises:
            CheckpointError: the disk does not take the new index.
        """
        dropped = [row.step for row in self.catalogue.rows if row.step > step and not row.is_published]
        if dropped:
            with disk_errors(self.folder.path):
                self.replace_rows({s: row for s, row in self.rows.items() if s not in dropped})
        return dropped


def _check_same(wanted: About, found: About, path: Path) -> None:
    for name in ("config", "tokenizer_sha256"):
        if getattr(wanted, name) != getattr(found, name):
            raise CheckpointError(f"{path} is the history of another run: its {name} differs; name another folder")


def lock_folder(path: Path) -> int:
    """Return the descriptor that keeps other writers out of a folder until it is closed.

    Raises:
        CheckpointError: another process has it.
    """
    descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise CheckpointError(f"another process is writing the history {path}; wait for it to end") from error
    return descriptor


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write the history {path}: {error.strerror or error}; it holds what it held before"
        ) from error
