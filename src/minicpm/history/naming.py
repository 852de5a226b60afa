"""The one place that says what a model's name means: RUN@STEP is a checkpoint of a run, the rest is `hub`'s.

A checkpoint that lies whole in its run's folder is taken from there. One of a history is written out once, as a model
folder in the cache. What this leaves out: opening the model.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm import hub
from minicpm.errors import CheckpointError

if TYPE_CHECKING:
    from minicpm.history.catalogue import Precision
    from minicpm.history.reading import History

_PATTERN = re.compile(r"(.+)@(\d{1,15})(:base)?")
# Written-out checkpoints that stay in the cache.
_NUM_KEPT = 8


@dataclass(frozen=True)
class StepName:
    """RUN@STEP, or RUN@STEP:base for the base layer alone; `run` is a folder or a URL."""

    run: str
    step: int
    precision: Precision

    def __str__(self) -> str:
        return f"{self.run}@{self.step}{':base' if self.precision == 'base' else ''}"


def parse_step(text: str) -> StepName | None:
    """Return the run and the step that `text` names, or None where it is no such name."""
    match = _PATTERN.fullmatch(text)
    # hf:OWNER/NAME is a model of the hub, hf://OWNER/NAME a history there.
    is_hub = text.startswith(("hf:", "ms:")) and "://" not in text
    if match is None or is_hub or os.path.exists(os.path.expanduser(text)):
        return None
    return StepName(match[1], int(match[2]), "base" if match[3] else "exact")


def resolve(name_or_path: str | Path, allow_pull: bool = True) -> Path:
    """Return the file or folder that a model's name means: that of RUN@STEP, else what `hub.resolve` says.

    Raises:
        HubError: nothing is called so, or it cannot be fetched.
        CheckpointError: the run has no such step (with the nearest), or its history is damaged or out of reach.
    """
    name = parse_step(name_or_path) if isinstance(name_or_path, str) else None
    return hub.resolve(name_or_path, allow_pull) if name is None else step_folder(name)


def step_folder(name: StepName) -> Path:
    """Return the model folder of a checkpoint, written into the cache if the run does not hold it as one.

    Raises:
        CheckpointError: there is no such checkpoint, or the disk does not take it.
    """
    own = Path(name.run).expanduser() / f"step_{name.step:06d}"
    if name.precision == "exact" and any((own / file).is_file() for file in ("config.json", "adapter_config.json")):
        return own
    history = open_history(name.run)
    snapshot = history.at(name.step, precision=name.precision)
    shelf = hub.cache_folder() / "history"
    # The manifest's hash says which weights; the tokenizer comes from what the history is of.
    target = shelf / f"{snapshot.row.manifest_sha256[:20]}-{history.catalogue.about_sha256[:8]}-{name.precision}"
    if target.is_dir():
        with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
            os.utime(target)
        return target
    from minicpm.history.model_folder import write_model_folder

    _make_room(shelf)
    write_model_folder(history, snapshot, target)
    return target


def open_history(run: str) -> History:
    """Return the history of a run's folder, of a history's own folder, or of a URL.

    Raises:
        CheckpointError: there is none.
    """
    from minicpm.history.reading import History

    if "://" not in run and not os.path.isdir(os.path.expanduser(run)):
        raise CheckpointError(f"there is no run {run!r}: give its folder, its folder `history`, or the history's URL")
    return History(os.path.expanduser(run) if "://" not in run else run)


def _make_room(shelf: Path) -> None:
    """Keep the cache from growing: of what was written out, the newest few stay."""
    with contextlib.suppress(OSError):  # there is none yet, or another process clears it too
        old = sorted((p for p in shelf.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
        for path in old[_NUM_KEPT - 1 :]:
            shutil.rmtree(path, ignore_errors=True)
