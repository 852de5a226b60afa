"""A quantized model as the folder that transformers, vLLM, gptqmodel and their kin read: GPTQ's or AWQ's layout.

Matrices of the layers are packed; embedding, head and norms stay in half precision. What this leaves out: rounding
(`minicpm.quant`), and the packing itself (`minicpm.formats.int4_folder`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from minicpm.exchange import folder as folders
from minicpm.exchange.card import CardFacts, write_card
from minicpm.exchange.check import HashedEntries
from minicpm.exchange.family import Move
from minicpm.exchange.recast import recast
from minicpm.exchange.source import Source
from minicpm.formats.block_type import AnyArray
from minicpm.formats.hf_config import config_to_hf
from minicpm.formats.int4_folder import Int4Layout
from minicpm.formats.safetensors_write import AnyEntry, TensorEntry, write_safetensors_model
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry
from minicpm.quant.judge import Closeness

Judge = Callable[[Path, Mapping[str, str]], Closeness]


def write_int4_folder(
    source: Source, weights: Mapping[str, Weight], types: Mapping[str, str], destination: Path, judge: Judge
) -> Closeness:
    """Write the folder whole or not at all, and return what `judge` finds in it before the hashes are written.

    Args:
        source: whose configuration and tokenizer go along.
        weights: the rounded ones by HF name, packed matrices in blocks that repeat their group's scale.
        types: of every matrix, by HF name.
        destination: must not exist.
        judge: is given the folder and the digests of what should be in it.

    Raises:
        CheckpointError: norms beyond half precision, or what `judge` raises.
    """
    kind = next(kind for kind in types.values() if kind != "F16")
    method, _, width = kind.lower().partition("-")
    layout = Int4Layout.of(method, int(width))
    config = source.checkpoint.config.replace(torch_dtype="float16")
    plain = {
        name: weight if types.get(name) == kind else recast(name, weight, "F16") for name, weight in weights.items()
    }
    hashed = HashedEntries({name: WeightEntry.of(weight) for name, weight in plain.items()})
    entries: dict[str, AnyEntry] = {}
    for name, entry in hashed.entries.items():
        entries |= _packed(name, entry, layout) if types.get(name) == kind else {name: entry}
    with folders.new_folder(destination) as folder:
        write_safetensors_model(folder, entries)
        move = Move(config, hashed.entries, source.note)
        folders.write_config(folder, move, config_to_hf(config) | {"quantization_config": layout.to_hf()})
        folders.write_generation_config(folder, source)
        folders.write_tokenizer(folder, source)
        closeness = judge(folder, hashed.digests)
        facts = CardFacts(
            name=destination.name,
            source=source.name,
            licence=source.licence,
            config=config,
            family=config.model_type,
            dtype=f"int4 ({method.upper()}'s layout, groups of {width}; transformers reads it through `gptqmodel`)",
            check=closeness.describe(),
            is_folded=source.note is not None,
            verb="quantize",
        )
        (folder / "README.md").write_text(write_card(facts), encoding="utf-8")
        folders.write_manifest(folder)
    return closeness


def _packed(name: str, entry: WeightEntry, layout: Int4Layout) -> dict[str, AnyEntry]:
    """Return the entries of a packed matrix; the tensors of the last matrix that was asked for are kept."""
    made: dict[str, AnyArray] = {}

    def make(suffix: str) -> AnyArray:
        if not made:
            made.update(layout.pack(entry.make()))
        return made.pop(suffix)

    stem = name.removesuffix(".weight")
    return {
        f"{stem}.{suffix}": TensorEntry(dtype, shape, partial(make, suffix))
        for suffix, (dtype, shape) in layout.tensors(entry.shape).items()
    }
