"""The default model through other formats and back: how much of it is left, on text that every installation has."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest

from minicpm.exchange.agreement import Agreement, agreement
from minicpm.exchange.backends import EngineBackend
from minicpm.exchange.convert import convert
from minicpm.exchange.source import open_source

NUM_TOKENS = 800


def text() -> str:
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in ("assert", "booleans", "exceptions", "formatstrings", "naming"))


@pytest.mark.slow
def test_what_is_left_of_the_default_model(tmp_path: Path, smollm2_path: Path) -> None:
    ids = open_source(smollm2_path).tokenizer.encode(text())[:NUM_TOKENS]
    assert len(ids) == NUM_TOKENS
    truth = EngineBackend(str(smollm2_path)).score(ids)

    def left(path: Path) -> Agreement:
        return agreement(truth, EngineBackend(str(path)).score(ids))

    folder = convert(smollm2_path, tmp_path / "hf", to="llama", is_verified=False).path
    half = left(convert(folder, tmp_path / "f16.gguf", to="gguf", dtype="fp16", is_verified=False).path)
    # Measured over 1,500 tokens: 99.93 % and 3.7e-6; rounding to half precision is all that is lost.
    assert half.top1 >= 0.998
    assert half.mean_kl <= 5e-5
    eight = left(convert(folder, tmp_path / "q8.gguf", to="gguf", dtype="q8_0", is_verified=False).path)
    # Measured over 1,500 tokens: 98.2 % and 1.1e-3.
    assert eight.top1 >= 0.97
    assert eight.mean_kl <= 2e-3
