"""Checkpoints in the layout of the Hugging Face cache, each a revision: `from_pretrained(NAME, revision="step500")`.

    CACHE/models--local--NAME/refs/step500            holds the snapshot's name
    CACHE/models--local--NAME/snapshots/…/config.json …

`from_pretrained` honours `revision=` in its cache alone; a folder has none. With HF_HUB_OFFLINE=1 it asks nobody. What
this leaves out: uploading.

Source: huggingface_hub, "Understand caching" (the cache-system layout: refs, snapshots).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from minicpm.errors import CheckpointError, ConfigError
from minicpm.exchange.convert import convert
from minicpm.history.catalogue import Precision
from minicpm.history.model_folder import write_model_folder
from minicpm.history.reading import History, Snapshot

_OWNER = "local"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,90}")


def write_hub_layout(
    history: History,
    steps: Sequence[int],
    cache: Path,
    name: str,
    to: str = "granite",
    precision: Precision = "exact",
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Make the cache folder hold the checkpoints as revisions of one repository, and return the repository's name.

    What is there already is kept; `main` is the last step. Each revision appears whole or not at all.

    Raises:
        ConfigError: a name that the hub does not allow.
        MiniCPMError: a checkpoint that cannot be read or converted, or a disk that is full.
    """
    if not _NAME.fullmatch(name) or "--" in name or ".." in name:
        raise ConfigError(f"{name!r} is no repository name; give letters, digits, - _ and . with --name")
    repository = cache / f"models--{_OWNER}--{name}"
    last = ""
    for step in steps:
        snapshot = history.at(step, precision=precision)
        facts = f"{snapshot.row.manifest_sha256} {history.catalogue.about_sha256} {to} {precision}"
        last = hashlib.sha256(facts.encode()).hexdigest()[:40]
        target = repository / "snapshots" / last
        try:
            if not target.is_dir():
                say(f"writing step {step}")
                # A sibling of the snapshots, on the same disk.
                partial = repository / f".partial-{os.urandom(4).hex()}"
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_revision(history, snapshot, partial / name, to)
                    (partial / name).rename(target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            _write_ref(repository, f"step{step}", last)
        except OSError as error:
            raise CheckpointError(f"cannot write {repository}: {error.strerror or error}") from error
    _write_ref(repository, "main", last)
    return f"{_OWNER}/{name}"


def write_revision(history: History, snapshot: Snapshot, path: Path, to: str = "granite") -> None:
    """Make `path` the folder that transformers opens a checkpoint from.

    Raises:
        MiniCPMError: the checkpoint cannot be read or converted, `path` exists, or the disk is full.
    """
    source = path.with_name(f"{path.name}.source")
    try:
        write_model_folder(history, snapshot, source)
        convert(source, path, to=to, is_verified=False)
    finally:
        shutil.rmtree(source, ignore_errors=True)


def _write_ref(repository: Path, name: str, snapshot: str) -> None:
    refs = repository / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    partial = refs / f".{name}.partial"
    partial.write_text(snapshot, encoding="utf-8")
    partial.replace(refs / name)
