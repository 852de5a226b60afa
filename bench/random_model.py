"""Full-size models of random weights, 4-bit or bfloat16: as large and as slow as real ones, and made in seconds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from minicpm.architecture import ModelConfig
from minicpm.formats import blocks
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry

# Standard deviation of a nibble, all sixteen values being as likely.
_NIBBLE_SPREAD = 4.6
_LONGEST_PIECE = 12
# What such a file calls itself; another name is one of an older making.
RANDOM_NAME = "random weights, learned-like vocabulary"


def random_q4_0(generator: np.random.Generator, shape: tuple[int, ...], std: float) -> Weight:
    """Return random weights of about `std`: blocks of a fp16 scale near std/4.6 and 32 nibbles, never rounded."""
    rows, row_bytes = shape[0], blocks.block_type("Q4_0").row_bytes(shape[1])
    data = np.frombuffer(generator.bytes(rows * row_bytes), np.uint8).reshape(rows, -1, 18).copy()
    scales = generator.uniform(0.5, 1.5, 4096).astype(np.float16) * np.float16(std / _NIBBLE_SPREAD)
    data[:, :, :2] = np.resize(scales, rows * data.shape[1]).view(np.uint8).reshape(rows, -1, 2)
    return Weight("Q4_0", shape, data.reshape(rows, row_bytes))


def random_bf16(generator: np.random.Generator, shape: tuple[int, ...], std: float) -> Weight:
    """Return normal random weights, one row after another so that a large matrix needs no second copy."""
    data = np.empty((shape[0], 2 * shape[1]), np.uint8)
    for row in data:
        values = generator.standard_normal(shape[1], np.float32) * np.float32(std)
        row[:] = (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return Weight("BF16", shape, data)


_MATRICES = {"Q4_0": random_q4_0, "BF16": random_bf16}


def write_random_model(path: Path, config: ModelConfig, block_type: str = "Q4_0") -> None:
    """Write `config` with random matrices of `block_type`, the embedding's too, and a vocabulary for llama.cpp."""
    generator = np.random.default_rng(0)

    def make(shape: tuple[int, ...]) -> Weight:
        if len(shape) == 1:
            return Weight.from_array(np.ones(shape, np.float32))
        # Widths keep a layer's output near its input's size, so that no activation overflows in any program.
        return _MATRICES[block_type](generator, shape, shape[1] ** -0.5)

    entries = {
        name: WeightEntry(shape, "F32" if len(shape) == 1 else block_type, lambda shape=shape: make(shape))
        for name, shape in config.weight_shapes().items()
    }
    write_gguf_model(path, config, entries, _vocabulary(config.vocab_size))


def _vocabulary(size: int) -> dict[str, Any]:
    """Return the metadata of a SentencePiece vocabulary: controls, bytes, characters, and joins of earlier pieces.

    Like a learned one it has about as many merge rules as pieces, so that building it takes about as long.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    num_plain = len(pieces)
    pieces += ["▁", *map(chr, range(33, 127)), *map(chr, range(0x4E00, 0x4E00 + 5000))][: size - num_plain]
    known, draws = set(pieces), random.Random(0)
    while len(pieces) < size:
        # Early pieces are joined most, as frequent ones are.
        left, right = (pieces[num_plain + int((len(pieces) - num_plain) * draws.random() ** 2)] for _ in range(2))
        joined = left + right
        if joined not in known and len(joined) <= _LONGEST_PIECE and not right.startswith("▁"):
            known.add(joined)
            pieces.append(joined)
    return {
        "general.name": RANDOM_NAME,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(i) for i in range(size)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (size - num_plain),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
