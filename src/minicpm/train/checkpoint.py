"""Checkpoints: a folder that exists only whole, opens as a model, and continues a run to the bit.

    RUN/step_000500/
      config.json  model.safetensors  tokenizer.json …   the model, as every reader of HF folders knows it
  (or adapter_config.json  adapter_model.safetensors …  an adapter, as PEFT has it)
      state.safetensors                                  masters, moments, random state
      manifest.json                                      written last: every file's length and hash, and where it stands

It is written under another name, every file and the folder are synced, and then it is renamed: a crash, a kill or a
full disk at any moment leaves the older ones as they were. What this leaves out: coding many of them small (`history`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minicpm import __version__
from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.formats.hf_config import config_to_hf
from minicpm.model import adapter_files

FORMAT_VERSION = 1
MANIFEST, WEIGHTS, STATE = "manifest.json", "model.safetensors", "state.safetensors"
# What holds the weights, and what says how to read them.
_KINDS = {WEIGHTS: "config.json", adapter_files.WEIGHTS_NAME: adapter_files.CONFIG_NAME}
_PARTIAL = ".partial-"
# A file system needs room for its own books too.
_SPACE_MARGIN = 1.2


@dataclass(frozen=True)
class Manifest:
    """Where a checkpoint stands in its run, and what it consists of.

    `parent` is what its run began from ("RUN@STEP" and that manifest's hash), None for a run from nothing. `losses` are
    the named measurements of its step; `run` is the resolved configuration as plain data.
    """

    step: int
    stage: str
    tokens: int
    lr: float
    losses: dict[str, float]
    seed: int
    tokenizer_sha256: str
    run: dict[str, Any]
    parent: str | None = None
    format_version: int = FORMAT_VERSION
    code_version: str = __version__
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def step_name(step: int) -> str:
    """Return the folder's name of `step`."""
    return f"step_{step:06d}"


def step_folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run by rising step, whole or not."""
    found = [p for p in run.glob("step_*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save(
    run: Path,
    manifest: Manifest,
    config: ModelConfig | None,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    texts: Mapping[str, bytes],
) -> Path:
    """Write the checkpoint of `manifest.step` into `run` and return its folder; `texts` are further small files.

    Without a `config` the weights are an adapter's, whose configuration is among the texts.

    Raises:
        OSError: the disk is full or broken; nothing has changed then.
    """
    final = run / step_name(manifest.step)
    check_space(run, num_bytes(weights) + num_bytes(state))
    partial = run / f"{_PARTIAL}{final.name}-{secrets.token_hex(4)}"
    try:
        partial.mkdir()
        for name, content in texts.items():
            (partial / name).write_bytes(content)
        if config is not None:
            (partial / "config.json").write_text(json.dumps(config_to_hf(config), indent=2) + "\n", encoding="utf-8")
        write_tensors(partial / (WEIGHTS if config is not None else adapter_files.WEIGHTS_NAME), weights)
        write_tensors(partial / STATE, state)
        files = {path.name: _seal(path) for path in sorted(partial.iterdir())}
        written = dataclasses.replace(manifest, files=files)
        (partial / MANIFEST).write_text(json.dumps(dataclasses.asdict(written), indent=2) + "\n", encoding="utf-8")
        _seal(partial / MANIFEST)
        sync(partial)
        _take_place(partial, final)
        sync(run)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; a full disk is an `OSError` whatever the library makes of it."""
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, str(error), str(path)) from error


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of all `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_space(folder: Path, needed: int) -> None:
    """Return if `folder`'s disk has room for `needed` bytes and a margin.

    Raises:
        OSError: with ENOSPC and the numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < needed * _SPACE_MARGIN:
        message = f"a checkpoint takes {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free"
        raise OSError(errno.ENOSPC, message, str(folder))


def _seal(path: Path) -> dict[str, Any]:
    # The library makes its files private to this user; others may serve what this user trained.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sync(path: Path) -> None:
    """Make a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take_place(partial: Path, final: Path) -> None:
    if not final.exists():
        partial.rename(final)
        return
    # A resumed run makes a step again whose folder was found broken; a folder cannot be renamed onto another.
    stale = partial.with_name(partial.name + "-replaced")
    final.rename(stale)
    partial.rename(final)
    shutil.rmtree(stale, ignore_errors=True)


def clear_partial(run: Path) -> None:
    """Remove what killed processes left half-written."""
    for path in run.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint, its files unread.

    Raises:
        CheckpointError: there is none, or it is not one of this version.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        names = {f.name for f in dataclasses.fields(Manifest)}
        if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION or set(data) != names:
            raise ValueError(f"not a manifest of version {FORMAT_VERSION}")
        return Manifest(**data)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder.name} has no {MANIFEST}: it was not finished, or is no checkpoint") from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def verify(folder: Path) -> Manifest:
    """Return the manifest after every file's length and hash were compared with it.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    if folder.name != step_name(manifest.step):
        raise CheckpointError(f"{folder.name} holds the checkpoint of step {manifest.step}")
    if not any({weights, STATE, config} <= set(manifest.files) for weights, config in _KINDS.items()):
        raise CheckpointError(f"{folder.name}: the manifest does not list {WEIGHTS}, {STATE} and config.json")
    for name, facts in manifest.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{folder.name}: {name} is missing")
        size = path.stat().st_size
        if size != facts.get("bytes"):
            raise CheckpointError(f"{folder.name}: {name} has {size} bytes, the manifest says {facts.get('bytes')}")
        if sha256(path) != facts.get("sha256"):
            raise CheckpointError(f"{folder.name}: {name} was changed (its hash differs from the manifest's)")
    return manifest


def newest_verified(run: Path) -> tuple[Path | None, Manifest | None, list[str]]:
    """Return the newest whole checkpoint of `run`, its manifest, and why newer ones were skipped."""
    skipped: list[str] = []
    for folder in reversed(step_folders(run)):
        try:
            return folder, verify(folder), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, None, skipped


def find(run: Path, step: int) -> tuple[Path, Manifest]:
    """Return the verified checkpoint of `step`.

    Raises:
        CheckpointError: the run has none at that step (with the nearest), or it is not whole.
    """
    folder = run / step_name(step)
    if not folder.is_dir():
        steps = sorted((int(p.name[5:]) for p in step_folders(run)), key=lambda s: abs(s - step))
        near = f"the nearest are {', '.join(map(str, sorted(steps[:4])))}" if steps else "it has none"
        raise CheckpointError(f"{run} has no checkpoint of step {step}; {near}")
    return folder, verify(folder)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    with _readable(folder):
        return load_file(_weights_file(folder))


def _weights_file(folder: Path) -> Path:
    return next((folder / name for name in _KINDS if (folder / name).is_file()), folder / WEIGHTS)


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (weights, state) of a checkpoint.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    with _readable(folder):
        return load_file(_weights_file(folder)), load_file(folder / STATE)
