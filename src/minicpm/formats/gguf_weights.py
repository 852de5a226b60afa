"""An open GGUF file -> configuration and weights under HF names in HF row order.

The one place that undoes the permutation of the q and k rows, but for the engine, which repacks rows anyway.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

from minicpm.architecture import ModelConfig
from minicpm.errors import FormatError
from minicpm.formats import names
from minicpm.formats.gguf_config import config_from_gguf, supported_architecture
from minicpm.formats.gguf_read import GGUFFile
from minicpm.formats.mapped_file import release
from minicpm.formats.rope_factors import ROPE_TENSOR
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry

_TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


def gguf_config_and_entries(file: GGUFFile) -> tuple[ModelConfig, dict[str, WeightEntry]]:
    """Return the configuration and every tensor of `file` but the rope divisors.

    Raises:
        FormatError: an unsupported architecture, a broken key, or a tensor of no known name.
    """
    where = str(file.path)
    supported_architecture(file.metadata, where)  # before anything about tensors, whose names depend on it
    embedding = file.tensors.get(names.HF_TO_GGUF["model.embed_tokens.weight"])
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{where}: the tensor token_embd.weight is missing or no matrix")
    vocab_size = embedding.shape[0]
    num_tokens = file.metadata.count("tokenizer.ggml.tokens")
    if num_tokens not in (0, vocab_size):
        raise FormatError(f"{where}: the vocabulary has {num_tokens} tokens, the embedding {vocab_size} rows")
    types = Counter(info.block_type for info in file.tensors.values() if len(info.shape) > 1)
    divisors = file.weight(ROPE_TENSOR).decode().reshape(-1) if ROPE_TENSOR in file.tensors else None
    config = config_from_gguf(
        file.metadata,
        vocab_size=vocab_size,
        is_tied=names.HF_TO_GGUF["lm_head.weight"] not in file.tensors,
        rope_divisors=divisors,
        torch_dtype=_TORCH_DTYPES.get(types.most_common(1)[0][0], "float16"),
        where=where,
    )
    return config, _entries(file, config)


def _entries(file: GGUFFile, config: ModelConfig) -> dict[str, WeightEntry]:
    entries: dict[str, WeightEntry] = {}
    unknown: list[str] = []
    for theirs, info in file.tensors.items():
        ours = names.translate(theirs, names.GGUF_TO_HF)
        if ours is None:
            unknown += [theirs] if theirs != ROPE_TENSOR else []
            continue
        num_heads = names.rotated_heads(ours, config)
        plain = partial(file.weight, theirs)
        reordered = partial(_reordered, file, theirs, num_heads)
        entries[ours] = (
            WeightEntry(info.shape, info.block_type, reordered, make_interleaved=plain)
            if num_heads
            else WeightEntry(info.shape, info.block_type, plain)
        )
    if unknown:
        biased = " (biases are not supported)" if any(name.endswith(".bias") for name in unknown) else ""
        raise FormatError(
            f"{file.path}: tensors of no known name: {', '.join(unknown[:8])}, {len(unknown)} in all{biased}"
        )
    return entries


def _reordered(file: GGUFFile, name: str, num_heads: int) -> Weight:
    weight = file.weight(name)
    reordered = weight.take_rows(names.rotate_half_order(num_heads, weight.num_rows // num_heads))
    release(weight.data)
    return reordered
