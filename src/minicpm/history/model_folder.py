"""A checkpoint of a history as a model folder: config.json, model.safetensors, the tokenizer's files.

What this leaves out: other families and file formats (`exchange.convert`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpm.errors import CheckpointError
from minicpm.formats.hf_config import config_to_hf
from minicpm.formats.safetensors_write import write_safetensors_model
from minicpm.formats.weight_map import WeightEntry
from minicpm.history.place import PARTIAL
from minicpm.history.reading import History, Snapshot

_ORIGIN = "minicpm_history.json"


def write_model_folder(history: History, snapshot: Snapshot, path: Path) -> None:
    """Make `path` a model folder with the weights of `snapshot`, one tensor in memory at a time; whole or not at all.

    Raises:
        CheckpointError: `path` exists, the history is damaged, or the disk does not take it.
    """
    facts = snapshot.manifest.facts
    origin = {
        "history": history.place.name,
        "step": facts.step,
        "tokens": facts.tokens,
        "stage": facts.stage,
        "lr": facts.lr,
        "precision": snapshot.precision,
        "manifest_sha256": snapshot.row.manifest_sha256,
    }
    write_folder(history, snapshot.weights().entries, origin, path)


def write_folder(history: History, entries: Mapping[str, WeightEntry], origin: Mapping[str, Any], path: Path) -> None:
    """Make `path` a model folder of the history's network with any weights; whole or not at all.

    Raises:
        CheckpointError: `path` exists, the history is damaged, or the disk does not take it.
    """
    if path.exists():
        raise CheckpointError(f"{path} exists already; name a folder that does not, or remove it first")
    partial = path.with_name(f"{PARTIAL}{path.name}-{os.urandom(4).hex()}")
    try:
        partial.mkdir(parents=True)
        for name, content in history.files().items():
            (partial / name).write_bytes(content)
        (partial / "config.json").write_text(json.dumps(config_to_hf(history.config), indent=2) + "\n", "utf-8")
        (partial / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
        write_safetensors_model(partial, entries)
        partial.rename(path)
    except OSError as error:
        if path.is_dir():
            return  # another process wrote the same folder meanwhile
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
