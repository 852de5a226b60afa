"""Small models to write and to break: random weights as entries, and the vocabulary that llama.cpp asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tests.reference import random_weights

from minicpm.architecture import ModelConfig
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry


def entries_of(weights: Mapping[str, Any], block_type: str | Callable[[str], str] = "F32") -> dict[str, WeightEntry]:
    """Entries of float arrays; vectors are F32, matrices `block_type` (or what it says for a name)."""
    entries = {}
    for name, array in weights.items():
        kind = block_type(name) if callable(block_type) else block_type
        weight = Weight.from_array(array, kind if array.ndim > 1 else "F32")
        entries[name] = WeightEntry(weight.shape, weight.block_type, lambda weight=weight: weight)
    return entries


def random_entries(config: ModelConfig, block_type: str = "F32", seed: int = 0) -> dict[str, WeightEntry]:
    """Entries of a random model."""
    return entries_of(random_weights(config, seed), block_type)


def vocabulary(size: int) -> dict[str, Any]:
    """The metadata of a SentencePiece vocabulary of `size` tokens: controls, bytes, words."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [f"▁词{i}" for i in range(size - len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces[:size],
        "tokenizer.ggml.scores": [-float(i) for i in range(size)],
        "tokenizer.ggml.token_type": ([2, 3, 3] + [6] * 256 + [1] * size)[:size],
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def as_llama(config: ModelConfig) -> ModelConfig:
    """`config` with neutral scales and the type llama."""
    return config.replace(
        model_type="llama",
        scale_emb=1.0,
        scale_depth=float(np.sqrt(config.num_hidden_layers)),
        dim_model_base=float(config.hidden_size),
    )
