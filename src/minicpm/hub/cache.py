"""The cache folder: one folder per model, written aside and moved into place when it is whole.

`source.json` in a model's folder says where it came from and what it must hash to; a folder without it is no model.
Names that begin with a dot are locks and unfinished downloads. Leaves out: how files are fetched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from minicpm.errors import HubError
from minicpm.hub.progress import Report, megabytes

MANIFEST = "source.json"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Digest:
    """What a file must hash to: `kind` is "sha256" or "git-sha1" (git's hash of the file as a blob)."""

    kind: str
    value: str


@dataclass(frozen=True)
class CachedFile:
    """A file of a cached model: `path` relative to the model's folder, with forward slashes."""

    path: str
    size_bytes: int
    digest: Digest


@dataclass(frozen=True)
class CachedModel:
    """A model that is whole in the cache."""

    name: str
    source: str
    licence: str
    revision: str
    folder: Path
    files: tuple[CachedFile, ...]

    @property
    def size_bytes(self) -> int:
        """The bytes of all its files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def path(self) -> Path:
        """What to open: its one GGUF file, else the folder."""
        ggufs = [file.path for file in self.files if file.path.endswith(".gguf")]
        return self.folder / ggufs[0] if len(ggufs) == 1 else self.folder


def cache_folder() -> Path:
    """Return MINICPM_HOME, else XDG_CACHE_HOME/minicpm, else ~/.cache/minicpm; it need not exist.

    Raises:
        HubError: none of the three is known.
    """
    if home := os.environ.get("MINICPM_HOME"):
        return Path(home).expanduser().absolute()
    # The XDG rule: a relative path is ignored.
    if os.path.isabs(base := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(base) / "minicpm"
    try:
        return Path.home() / ".cache" / "minicpm"
    except RuntimeError as error:
        raise HubError("this user has no home folder; set MINICPM_HOME to a folder for models") from error


def models_folder() -> Path:
    """Return the folder that holds one folder per model."""
    return cache_folder() / "models"


def model_folder(name: str) -> Path:
    """Return where the model `name` ("smollm2", "hf:owner/name") is kept."""
    return models_folder() / name.replace(":", "--").replace("/", "--")


def find(name: str) -> CachedModel | None:
    """Return the cached model called `name`, or None when it is not there or not whole."""
    return _read(model_folder(name))


def list_models() -> list[CachedModel]:
    """Return every whole model of the cache, by name."""
    try:
        folders = sorted(p for p in models_folder().iterdir() if not p.name.startswith("."))
    except OSError:
        return []
    return [model for folder in folders if (model := _read(folder)) is not None]


def remove(name: str) -> CachedModel:
    """Delete the model `name` and return what it was.

    Raises:
        HubError: it is not in the cache, or the cache cannot be written.
    """
    model = find(name)
    if model is None:
        known = ", ".join(m.name for m in list_models()) or "nothing"
        raise HubError(f"no model {name!r} in the cache {models_folder()}, which holds {known}")
    with storage(0):
        # The manifest goes first, so that a half-deleted model is not taken for a whole one.
        (model.folder / MANIFEST).unlink()
        shutil.rmtree(model.folder)
    return model


def matches(path: Path, digest: Digest, report: Report | None = None) -> bool:
    """Return whether the file at `path` hashes to `digest`."""
    size_bytes = path.stat().st_size
    if digest.kind == "sha256":
        hasher = hashlib.sha256()
    else:
        hasher = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
    done_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
            done_bytes += len(chunk)
            if report is not None:
                report.advance(f"checking {path.name}", done_bytes, size_bytes)
    return hasher.hexdigest() == digest.value


def damaged_files(model: CachedModel, report: Report | None = None) -> list[str]:
    """Return the files of `model` that are missing, of another size, or of another hash."""
    bad = []
    for file in model.files:
        path = model.folder / file.path
        is_whole = path.is_file() and path.stat().st_size == file.size_bytes
        if not is_whole or not matches(path, file.digest, report):
            bad.append(file.path)
    return bad


def find_undamaged(name: str, report: Report) -> CachedModel | None:
    """Return the cached model `name` when every file of it still has its hash, else None."""
    model = find(name)
    if model is None:
        return None
    bad = damaged_files(model, report)
    if bad:
        report.say(f"{model.folder / bad[0]} does not have its hash any more")
    return None if bad else model


def publish(model: CachedModel, staging: Path) -> None:
    """Write the manifest into `staging` and move that folder to `model.folder`, replacing what was there."""
    manifest = dataclasses.asdict(model)
    del manifest["folder"]
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    old = model.folder.with_name(f".old-{model.folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if model.folder.exists():
        model.folder.rename(old)
    staging.rename(model.folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def storage(needed_bytes: int) -> Iterator[None]:
    """Turn the failures of a disk inside the block into one line that says what to do."""
    try:
        yield
    except OSError as error:
        folder = cache_folder()
        advice = "set MINICPM_HOME to another folder"
        if error.errno in _NO_SPACE:
            need = f" (this model needs {megabytes(needed_bytes)})" if needed_bytes else ""
            raise HubError(f"no space left in the cache folder {folder}{need}; free some, or {advice}") from error
        if error.errno in _NOT_WRITABLE:
            raise HubError(f"cannot write to the cache folder {folder}: {error.strerror}; {advice}") from error
        raise HubError(f"cannot use the cache folder {folder}: {error}; {advice}") from error


def require_space(needed_bytes: int) -> None:
    """Hold when the cache folder, which must exist, has `needed_bytes` free.

    Raises:
        HubError: with both numbers.
    """
    free_bytes = shutil.disk_usage(cache_folder()).free
    if free_bytes < needed_bytes:
        raise HubError(
            f"no space left in the cache folder {cache_folder()}: {megabytes(needed_bytes)} needed,"
            f" {megabytes(free_bytes)} free; free some, or set MINICPM_HOME to another folder"
        )


@contextlib.contextmanager
def lock(name: str, report: Report) -> Iterator[None]:
    """Hold the right to write the model `name`, among all processes of this machine; makes the cache folder."""
    # A module of POSIX systems, and only a pull needs it.
    import fcntl

    folder = model_folder(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.say(f"another pull of {name} runs; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The one before us deleted the file that we waited for: a later comer would lock a new one.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _read(folder: Path) -> CachedModel | None:
    try:
        data: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = tuple(
            CachedFile(str(f["path"]), int(f["size_bytes"]), Digest(**f["digest"])) for f in data.pop("files")
        )
        model = CachedModel(folder=folder, files=files, **{key: str(value) for key, value in data.items()})
        if all(_is_inside(f.path) and (folder / f.path).stat().st_size == f.size_bytes for f in files):
            return model
    except (OSError, ValueError, KeyError, TypeError):
        # Not a model: an unfinished or foreign folder. `pull` makes it anew.
        return None
    return None


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\\" not in path
