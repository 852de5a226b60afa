"""A tiny MiniCPM as OpenBMB would publish it: bf16, tokenizer.model, no key in config.json that theirs leaves out."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from minicpm.architecture import ModelConfig
from minicpm.formats.hf_config import config_to_hf
from minicpm.formats.safetensors_write import write_safetensors_model
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry

LINES = [
    "The quick brown fox jumps over the lazy dog, and it is 2024 already.",
    "山东省最高的山是泰山,海拔1545米。相对于黄山,泰山海拔较低。",
    "def f(x):\n    return x",
]
FolderWriter = Callable[..., Path]


def random_entries(config: ModelConfig, block_type: str = "BF16", seed: int = 0) -> dict[str, WeightEntry]:
    """Weights large enough that logits differ among tokens, in the order of the forward pass."""
    rng = np.random.default_rng(seed)
    entries = {}
    for name, shape in config.weight_shapes().items():
        values = rng.normal(size=shape).astype(np.float32)
        values = 1 + values * 0.1 if len(shape) == 1 else values * 0.15
        weight = Weight.from_array(values, block_type)
        entries[name] = WeightEntry(weight.shape, weight.block_type, lambda weight=weight: weight)
    return entries


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 8),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=331,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(buffer.getvalue())
    return path


@pytest.fixture
def write_minicpm(tmp_path: Path, tiny_config: ModelConfig, sentencepiece_file: Path) -> FolderWriter:
    """Write a folder; `config` and `entries` may be given."""

    def write(config: ModelConfig = tiny_config, entries: dict[str, WeightEntry] | None = None) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        values = config_to_hf(config)
        if config.tie_word_embeddings:
            del values["rope_theta"], values["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(values))
        (folder / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
        )
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
        write_safetensors_model(folder, entries or random_entries(config))
        return folder

    return write
