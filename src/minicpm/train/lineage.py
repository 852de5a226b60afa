"""Where a model comes from: the chain of runs that its folders remember.

A checkpoint's manifest names the folder of the model that its run began from; a merged model's `lineage.json` names the
adapter. What this leaves out: the history's own parents, which are the same strings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINEAGE = "lineage.json"
_MANIFEST = "manifest.json"
# No chain of real runs is longer; a folder that names itself must not be walked for ever.
_LONGEST = 64


@dataclass(frozen=True)
class Ancestor:
    """A model of the chain: its folder, what it is called, and what made it."""

    folder: Path
    name: str
    made_by: str


def parent_of(base: Path) -> tuple[str | None, str]:
    """Return what the checkpoints of a run from the model at `base` name as parent, and the folder.

    The parent is "RUN@STEP hash" of a checkpoint, else the model's name and the hash of its configuration.
    """
    path = base.resolve()
    for name in (_MANIFEST, LINEAGE, "config.json"):
        file = path / name
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            return f"{_name_of(path)} {digest}", str(path)
    return path.name, str(path)


def lineage(model: Path) -> Iterator[Ancestor]:
    """Yield the model and what it comes from, the youngest first; it ends where a folder says nothing or is gone.

    A run's folder stands for its newest checkpoint.

    Raises:
        OSError, ValueError: a folder's own note cannot be read.
    """
    folder: Path | None = _newest_checkpoint(model.resolve())
    for _ in range(_LONGEST):
        if folder is None:
            return
        yield Ancestor(folder, _name_of(folder), _made_by(folder))
        folder = _parent_folder(folder)


def _newest_checkpoint(folder: Path) -> Path:
    steps = [path for path in folder.glob("step_*") if (path / _MANIFEST).is_file() and path.name[5:].isdigit()]
    return max(steps, key=lambda path: int(path.name[5:]), default=folder)


def _name_of(path: Path) -> str:
    if (path / _MANIFEST).is_file() and path.name.startswith("step_"):
        return f"{path.parent.name}@{int(path.name[5:])}"
    return path.name


def _read(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def _made_by(folder: Path) -> str:
    if (folder / LINEAGE).is_file():
        return "merged"
    manifest = _read(folder / _MANIFEST)
    config = manifest.get("run", {}).get("config", {})
    if "goal" in config:
        loss = manifest.get("losses", {}).get("train")
        shown = f", loss {loss:.4f}" if isinstance(loss, int | float) else ""
        return f"{config['goal']}, {config['method']}, {manifest['step']} steps{shown}"
    if "step" in manifest:
        return f"pretraining, {manifest['step']} steps, {manifest.get('stage', '')}"
    return "a model" if folder.exists() else "gone"


def _parent_folder(folder: Path) -> Path | None:
    if (folder / LINEAGE).is_file():
        return Path(_read(folder / LINEAGE)["adapter"])
    manifest = _read(folder / _MANIFEST)
    named = manifest.get("run", {}).get("parent_folder")
    if named:
        return Path(named)
    # A branch of pretraining names a run beside its own.
    parent = str(manifest.get("parent") or "").partition(" ")[0]
    run, _, step = parent.rpartition("@")
    beside = folder.parent.parent / run / f"step_{int(step):06d}" if run and step.isdigit() else None
    return beside if beside is not None and beside.is_dir() else None
