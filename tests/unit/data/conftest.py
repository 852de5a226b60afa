"""A small vocabulary and small shards, made in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minicpm.data.shard_writer import ShardWriter
from minicpm.data.shards import TokenShards
from minicpm.tokenizer import Tokenizer, Vocabulary

MakeShards = Callable[..., TokenShards]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """SentencePiece-like: every byte, letters, some merges; `\\n` stands alone and digits are never joined."""
    pieces = ["<unk>", "<s>", "</s>", "\n", "\t", *(f"<0x{i:02X}>" for i in range(256))]
    types = [2, 3, 3, 4, 4, *[6] * 256]
    merged = [
        "th",
        "the",
        "▁the",
        "▁▁",
        "▁▁▁▁",
        "in",
        "ing",
        "▁a",
        "an",
        "and",
        "▁and",
        "你好",
        "世界",
        "er",
        "ab",
        "abc",
    ]
    letters = [
        *"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'()你好世界的<>/",
        "用",
        "户",
        "I",
    ]
    singles = list(dict.fromkeys(letters))
    pieces += merged + singles
    types += [1] * (len(merged) + len(singles))
    scores = [0.0] * 261 + [-float(i) for i in range(len(merged) + len(singles))]
    return Tokenizer.from_vocabulary(
        Vocabulary("llama", pieces, types, scores, bos_id=1, eos_id=2, unk_id=0, adds_bos=True, prepends_space=True)
    )


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Write shards of documents with these lengths; ids are 3, 4, 5, … throughout, so that every token is unique."""
    made = 0

    def make(
        lengths: list[int], supervised_from: int | None = None, shard_tokens: int = 50, start: int = 3
    ) -> TokenShards:
        nonlocal made
        made += 1
        folder = tmp_path / f"shards{made}"
        folder.mkdir()
        writer = ShardWriter(folder, 1 << 20, is_supervised=supervised_from is not None, shard_tokens=shard_tokens)
        total = sum(lengths)
        mask = None
        if supervised_from is not None:
            mask = np.concatenate([np.arange(n) >= supervised_from for n in lengths]).astype(np.uint8)
        ids = np.arange(start, start + total, dtype=np.uint32)
        # In two calls, the second in the middle of a shard.
        half = len(lengths) // 2
        for part in (slice(0, half), slice(half, None)):
            first, size = sum(lengths[: part.start or 0]), sum(lengths[part])
            if size:
                writer.add(
                    ids[first : first + size],
                    np.array(lengths[part], np.int64),
                    np.array(lengths[part], np.int64),
                    None if mask is None else mask[first : first + size],
                )
        writer.finish({"tokenizer_hash": "abc", "pad_id": 2})
        return TokenShards.open(folder, "abc")

    return make
