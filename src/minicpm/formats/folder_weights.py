"""A folder's weights under HF names, from safetensors packed or not, or, where allowed, torch's pickles.

Dragonfly names are known too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, FormatError
from minicpm.formats import names, safetensors_read, torch_bin
from minicpm.formats.int4_folder import Int4Layout, packed_entries
from minicpm.formats.weight_map import WeightEntry

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def folder_entries(
    folder: Path, *, allow_pickle: bool = False, layout: Int4Layout | None = None
) -> dict[str, WeightEntry]:
    """Return the folder's weights under HF names, none of them read yet; names of no table stay as they are.

    Args:
        folder: where they lie.
        allow_pickle: whether torch's pickles may be read.
        layout: how matrices are packed, where the configuration says that they are.

    Raises:
        FormatError: no weights, a broken file, or pickles that were not allowed.
        CheckpointError: missing shards, or shards that do not agree with their index.
    """
    if (folder / safetensors_read.SINGLE).exists() or (folder / safetensors_read.INDEX).exists():
        entries = _from_safetensors(folder, layout)
    elif not torch_bin.has_torch_bin(folder):
        raise FormatError(f"{folder} is not a model folder: it has no {safetensors_read.SINGLE} and no index")
    elif not allow_pickle:
        raise FormatError(
            f"{folder} has its weights in pickles ({torch_bin.SINGLE}), which are read only where that is "
            "allowed explicitly (allow_pickle=True, --allow-pickle); torch then loads plain tensors and nothing else"
        )
    else:
        weights = torch_bin.load_torch_bins(folder)
        entries = {
            name: WeightEntry(weight.shape, weight.block_type, partial(weights.__getitem__, name))
            for name, weight in weights.items()
        }
    return _under_hf_names(entries, folder)


def _from_safetensors(folder: Path, layout: Int4Layout | None) -> dict[str, WeightEntry]:
    files = safetensors_read.open_shards(folder)
    entries, used = packed_entries(files, layout) if layout is not None else ({}, set())
    for name, file in files.items():
        if name in used or names.is_ignored(name):
            continue
        place = file.tensors[name]
        if place.dtype not in safetensors_read.WEIGHT_DTYPES or not place.shape or not place.num_bytes:
            file.weight(name)  # says what is wrong
        entries[name] = WeightEntry(place.shape, place.dtype, partial(file.weight, name))
    return entries


def _under_hf_names(entries: Mapping[str, WeightEntry], folder: Path) -> dict[str, WeightEntry]:
    entries = {name: entry for name, entry in entries.items() if not names.is_ignored(name)}
    if names.HF_TO_DRAGONFLY[EMBEDDING] not in entries:
        return entries
    renamed: dict[str, WeightEntry] = {}
    for name, entry in entries.items():
        ours = names.translate(name, names.DRAGONFLY_TO_HF) or name
        if ours in renamed:
            raise CheckpointError(f"{folder}: two tensors mean {ours}, one of them called {name}")
        renamed[ours] = entry
    return renamed


def without_tied_copy(entries: dict[str, WeightEntry], config: ModelConfig, where: str) -> dict[str, WeightEntry]:
    """Return `entries` without a head that only repeats the embedding of a model with tied embeddings.

    Raises:
        CheckpointError: the head is another one, so that tying would silently drop it.
    """
    if not config.tie_word_embeddings or HEAD not in entries or EMBEDDING not in entries:
        return entries
    head, embedding = entries[HEAD].make(), entries[EMBEDDING].make()
    if head.block_type != embedding.block_type or head.shape != embedding.shape:
        is_copy = False
    else:
        step = max(1, (1 << 24) // head.data.shape[1])
        rows = range(0, head.num_rows, step)
        is_copy = all(np.array_equal(head.data[r : r + step], embedding.data[r : r + step]) for r in rows)
    if not is_copy:
        raise CheckpointError(
            f"{where}: {HEAD} differs from {EMBEDDING}, but the configuration ties them (for minicpm also by default); "
            'set "tie_word_embeddings": false in config.json to use the head'
        )
    return {name: entry for name, entry in entries.items() if name != HEAD}
