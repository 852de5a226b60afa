"""An adapter and its base into one model: in float32, rounded once, tensor by tensor, and checked.

What this leaves out: block types. An adapter's change is smaller than the steps of 4-bit blocks; merged into them it
would be lost. The merged model is float, and `convert` quantizes that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minicpm.errors import CheckpointError, ConfigError
from minicpm.exchange.agreement import Agreement, Scores, agreement
from minicpm.exchange.backends import log_softmax
from minicpm.exchange.check import TEXT
from minicpm.exchange.convert import write_folder
from minicpm.exchange.family import Move
from minicpm.exchange.layout import FLOAT_DTYPES, FLOAT_OF_TORCH, TORCH_NAMES, parse_dtype
from minicpm.exchange.recast import recast
from minicpm.exchange.source import Source, open_source
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry
from minicpm.model.adapter_files import CONFIG_NAME, load_adapter, read_base_name, read_tensors
from minicpm.model.loading import load_model, read_tensor
from minicpm.model.lora import LoRASettings, fused_embedding, fused_projection
from minicpm.train.lineage import LINEAGE

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Merged:
    """What was written: the folder, how many weights an adapter changed, and how the result compares, if asked."""

    path: Path
    num_changed: int
    dtype: str
    agreement: Agreement | None
    max_delta_logit: float | None


def merge(
    adapter: Path,
    destination: Path,
    *,
    base: Path | None = None,
    dtype: str | None = None,
    is_verified: bool = True,
    find_base: Callable[[str], Path] = Path,
) -> Merged:
    """Write the model that an adapter and its base are together, as a folder of the base's family.

    Args:
        adapter: a folder in PEFT's format, such as a checkpoint of `sft --method lora`.
        destination: a folder that does not exist yet.
        base: the model that the adapter belongs to; None takes the one that the adapter names.
        dtype: bf16, fp16 or fp32; None is the base's.
        is_verified: whether base with adapter and the merged model are run on a fixed text, in float32.
        find_base: turns the name that the adapter gives into a path.

    Raises:
        ConfigError: a dtype in blocks, or a base in blocks without a dtype: what to do is said.
        MiniCPMError: the destination does not exist afterwards.
    """
    if not (adapter / CONFIG_NAME).is_file():
        raise CheckpointError(f"{adapter} is no adapter: it has no {CONFIG_NAME}")
    if destination.exists():
        raise CheckpointError(f"{destination} exists already; name another, or remove it first")
    named = read_base_name(adapter)
    if base is None and not named:
        raise ConfigError(f"{adapter} does not name its base; give it with --base")
    source = open_source(base if base is not None else find_base(named))
    target = _target(source, dtype)
    settings, found = read_tensors(adapter)
    moved = _merged(source, settings, found, target)
    measured: list[float] = []

    def finish(folder: Path) -> Agreement | None:
        note = {"adapter": str(adapter.resolve()), "base": str(source.path.resolve())}
        (folder / LINEAGE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        if not is_verified:
            return None
        compared, delta = compare_merged(source, adapter, folder)
        measured.append(delta)
        return compared

    result = write_folder(source, moved, destination, None, target, finish)
    return Merged(destination, len(found), TORCH_NAMES[target], result, measured[0] if measured else None)


def _target(source: Source, dtype: str | None) -> str:
    if dtype is not None:
        target = parse_dtype(dtype)
        if target not in TORCH_NAMES:
            raise ConfigError(
                f"an adapter cannot be merged into {dtype}: its change is smaller than a step of such blocks; merge "
                f"into {', '.join(FLOAT_DTYPES)} and quantize that with `minicpm convert OUT model.gguf --to gguf "
                f"--dtype {dtype}`"
            )
        return target
    types = source.checkpoint.weights.block_types()
    blocks = [kind for kind in types if kind not in TORCH_NAMES]
    if blocks:
        raise ConfigError(
            f"the base {source.path} is in blocks ({', '.join(blocks)}), and merging back into them would lose the "
            "adapter; give the unquantized base with --base, or --dtype bf16 for a float model of what the blocks say"
        )
    return FLOAT_OF_TORCH.get(source.checkpoint.config.torch_dtype, next(iter(types)))


def _merged(source: Source, settings: LoRASettings, found: Mapping[str, Mapping[str, Tensor]], target: str) -> Move:
    config, entries = source.checkpoint.config, dict(source.checkpoint.weights.entries)
    unknown = [module for module in found if f"{module}.weight" not in entries]
    if unknown:
        raise CheckpointError(
            f"{source.path} has no {', '.join(unknown[:3])}, which the adapter changes; another base?"
        )
    made = {
        name: WeightEntry(entry.shape, target, partial(_as_type, name, entry, target))
        for name, entry in entries.items()
    }
    for module, parts in found.items():
        name = f"{module}.weight"
        made[name] = WeightEntry(
            entries[name].shape, target, partial(_fused, name, entries[name], settings, parts, target)
        )
        if name == _EMBEDDING and config.tie_word_embeddings:
            # The head went on reading the frozen matrix.
            made[_HEAD] = WeightEntry(entries[name].shape, target, partial(_as_type, _HEAD, entries[name], target))
            config = config.replace(tie_word_embeddings=False)
    order = config.replace(torch_dtype=TORCH_NAMES[target]).weight_shapes()
    return Move(config.replace(torch_dtype=TORCH_NAMES[target]), {name: made[name] for name in order}, source.note)


def _as_type(name: str, entry: WeightEntry, target: str) -> Weight:
    return recast(name, entry.make(), target)


def _fused(name: str, entry: WeightEntry, settings: LoRASettings, parts: Mapping[str, Tensor], target: str) -> Weight:
    weight = read_tensor(entry.make()).float()
    make = fused_embedding if "lora_embedding_A" in parts else fused_projection
    value = make(weight, parts, settings.scaling)
    return recast(name, Weight.from_array(value.numpy().astype(np.float32), "F32"), target)


def compare_merged(source: Source, adapter: Path, merged: Path) -> tuple[Agreement, float]:
    """Return how the merged model differs from base and adapter on a fixed text, and the largest |Δ logit|.

    Both compute in float32, one after the other: what differs is the rounding of the merged weights.
    """
    ids = torch.tensor([source.tokenizer.add_bos(source.tokenizer.encode(TEXT))])
    with torch.inference_mode():
        model = load_model(source.checkpoint.config, source.checkpoint.weights, dtype=torch.float32)
        load_adapter(model, adapter)
        before = model(ids)[0].numpy()
        del model
        written = open_checkpoint(merged)
        after = load_model(written.config, written.weights, dtype=torch.float32)(ids)[0].numpy()
    compared = agreement(Scores(log_softmax(before)), Scores(log_softmax(after)))
    return compared, float(np.abs(before - after).max())
