"""Any model into any format: `convert` streams tensor by tensor, writes whole or not at all, checks what it wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minicpm.architecture import MODEL_TYPES
from minicpm.errors import CheckpointError, ConfigError
from minicpm.exchange import folder as folders
from minicpm.exchange.agreement import Agreement
from minicpm.exchange.card import CardFacts, write_card
from minicpm.exchange.check import HashedEntries, check_bytes, check_outputs
from minicpm.exchange.family import Entries, Move, move
from minicpm.exchange.layout import FLOAT_DTYPES, FLOAT_OF_TORCH, TORCH_NAMES, gguf_block_type, parse_dtype
from minicpm.exchange.recast import check_finite, recast
from minicpm.exchange.source import FOLD_KEY, Source, open_source
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.hf_config import config_to_hf
from minicpm.formats.safetensors_write import write_safetensors_model
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry
from minicpm.tokenizer import TokenType

TARGETS = (*MODEL_TYPES, "gguf")
# Below every piece that a text may use.
_PADDING_SCORE = -1e9
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What was written, and how it compares with its source (None when that was not asked for)."""

    path: Path
    family: str
    block_types: Counter[str]
    tensor_bytes: int
    agreement: Agreement | None

    def describe(self) -> str:
        """Return one line for people."""
        types = ", ".join(f"{name} ({count})" for name, count in self.block_types.most_common())
        return f"{self.path}: {self.family}, {self.tensor_bytes / 1e6:,.1f} MB of weights in {types}"


def convert(
    source: Path,
    destination: Path,
    *,
    to: str,
    dtype: str | None = None,
    family: str | None = None,
    licence: str | None = None,
    is_verified: bool = True,
    allow_pickle: bool = False,
    progress: Progress = lambda name, done, total: None,
) -> Conversion:
    """Write the model at `source` to `destination` in another format or dtype.

    Args:
        source: a GGUF file or a model folder.
        destination: a folder, or for GGUF a file, that does not exist yet.
        to: minicpm, granite, llama (folders for transformers) or gguf.
        dtype: bf16, fp16, fp32, and for gguf also q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k; None keeps the
            saved one.
        family: the architecture inside a GGUF; None keeps the source's.
        licence: overrides what the source says.
        is_verified: whether both models are run on a fixed text afterwards.
        allow_pickle: whether a `.bin` of the source may be read.
        progress: called with a tensor's name, how many are done, and how many there are.

    Raises:
        MiniCPMError: the destination does not exist afterwards.
    """
    if to not in TARGETS:
        raise ConfigError(f"format {to!r} is not known; known: {', '.join(TARGETS)}")
    if destination.exists():
        raise CheckpointError(f"{destination} exists already; name another, or remove it first")
    opened = open_source(source, allow_pickle=allow_pickle)
    target = parse_dtype(dtype) if dtype else None
    if to != "gguf" and target is not None and target not in TORCH_NAMES:
        raise ConfigError(f"a {to} folder holds {', '.join(FLOAT_DTYPES)}; {dtype} needs --to gguf")
    config = opened.checkpoint.config
    wanted = (family or config.model_type) if to == "gguf" else to
    # Where a quantized type follows, folded weights are rounded once, from float32.
    fold_type = target if target in TORCH_NAMES else "F32" if target else None
    moved = move(config, opened.checkpoint.weights.entries, wanted, opened.note, fold_type)
    if target is None:
        target = _saved_type(opened, moved, to)
    moved = _in_block_types(moved, target, to)
    hashed = HashedEntries(_reporting(moved.entries, progress))
    moved = Move(moved.config, hashed.entries, moved.note)
    finish = partial(_check, opened, hashed, is_verified)
    if to == "gguf":
        result = _write_gguf(opened, moved, destination, licence, finish)
    else:
        result = write_folder(opened, moved, destination, licence, target, finish)
    types = Counter(entry.block_type for entry in moved.entries.values())
    num_bytes = sum(entry.num_bytes for entry in moved.entries.values())
    return Conversion(destination, wanted, types, num_bytes, result)


def _saved_type(source: Source, moved: Move, to: str) -> str | None:
    """Return the type for a conversion that names none: the source's own, or None to keep each tensor's."""
    types = source.checkpoint.weights.block_types()
    if to == "gguf" and moved.note is None and source.note is None:
        return None
    if set(types) <= set(TORCH_NAMES):
        return FLOAT_OF_TORCH.get(moved.config.torch_dtype, next(iter(types)))
    # Blocks have half-precision scales: half precision holds what they decode to best among the 16-bit types.
    return FLOAT_OF_TORCH.get(moved.config.torch_dtype, "F16")


def _in_block_types(moved: Move, target: str | None, to: str) -> Move:
    entries = {}
    for name, entry in moved.entries.items():
        kind = target or entry.block_type
        if to == "gguf":
            kind = gguf_block_type(entry.shape, kind)
        entries[name] = WeightEntry(entry.shape, kind, partial(_make, name, entry, kind))
    config = moved.config
    if target is not None and target in TORCH_NAMES:
        config = config.replace(torch_dtype=TORCH_NAMES[target])
    return Move(config, entries, moved.note)


def _make(name: str, entry: WeightEntry, kind: str) -> Weight:
    weight = entry.make()
    if weight.block_type == kind:
        # recast would have looked at the values; what passes through untouched is looked at here.
        step = max(1, (1 << 22) // weight.shape[-1])
        for start in range(0, weight.num_rows, step):
            check_finite(name, weight.decode_rows(start, start + step), start)
        return weight
    return recast(name, weight, kind)


def _reporting(entries: Entries, progress: Progress) -> dict[str, WeightEntry]:
    done: Counter[str] = Counter()

    def reporting(name: str, entry: WeightEntry) -> WeightEntry:
        def make() -> Weight:
            weight = entry.make()
            done[name] += 1
            progress(name, len(done), len(entries))
            return weight

        return WeightEntry(entry.shape, entry.block_type, make)

    return {name: reporting(name, entry) for name, entry in entries.items()}


def _check(source: Source, hashed: HashedEntries, is_verified: bool, written: Path) -> Agreement | None:
    check_bytes(written, hashed.digests)
    return check_outputs(source.path, written, source.tokenizer) if is_verified else None


def _write_gguf(
    source: Source, moved: Move, destination: Path, licence: str | None, finish: Callable[[Path], Agreement | None]
) -> Agreement | None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial_path = destination.with_name(f".{destination.name}.partial")
    metadata = gguf_metadata(source, licence)
    if moved.note is not None:
        metadata[f"general.{FOLD_KEY}"] = json.dumps(moved.note.to_dict())
    try:
        write_gguf_model(partial_path, moved.config, moved.entries, metadata)
        result = finish(partial_path)
        partial_path.rename(destination)
        return result
    finally:
        partial_path.unlink(missing_ok=True)


def gguf_metadata(source: Source, licence: str | None = None) -> dict[str, Any]:
    """Return the keys of a GGUF file that say what the source is called, its licence (or `licence`), its tokenizer."""
    licence = licence or source.licence
    metadata = {"general.name": source.name} | ({"general.license": licence} if licence else {})
    return metadata | _vocabulary(source)


def _vocabulary(source: Source) -> dict[str, Any]:
    """Return the tokenizer's keys with a name for every row; unlike folders, GGUF has none beyond its vocabulary."""
    keys = source.tokenizer.to_gguf_metadata()
    first, end = source.tokenizer.vocab_size, source.checkpoint.config.vocab_size
    padding: dict[str, list[Any]] = {
        "tokens": [f"[PAD{number}]" for number in range(first, end)],
        "token_type": [int(TokenType.UNUSED)] * (end - first),
        "scores": [_PADDING_SCORE] * (end - first),
    }
    for name, values in padding.items():
        if f"tokenizer.ggml.{name}" in keys:
            keys[f"tokenizer.ggml.{name}"] = [*keys[f"tokenizer.ggml.{name}"], *values]
    return keys


def write_folder(
    source: Source,
    moved: Move,
    destination: Path,
    licence: str | None,
    target: str | None,
    finish: Callable[[Path], Agreement | None],
) -> Agreement | None:
    """Write a model folder whole or not at all, and return what `finish` finds before the hashes are written."""
    with folders.new_folder(destination) as folder:
        write_safetensors_model(folder, moved.entries)
        folders.write_config(folder, moved, config_to_hf(moved.config))
        folders.write_generation_config(folder, source)
        folders.write_tokenizer(folder, source)
        result = finish(folder)
        facts = CardFacts(
            name=destination.name,
            source=source.name,
            licence=licence or source.licence,
            config=moved.config,
            family=moved.config.model_type,
            dtype=TORCH_NAMES[target] if target else moved.config.torch_dtype,
            check=result.describe() if result else None,
            is_folded=moved.note is not None,
        )
        (folder / "README.md").write_text(write_card(facts), encoding="utf-8")
        folders.write_manifest(folder)
    return result
