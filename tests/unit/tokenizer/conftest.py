"""Small real vocabularies, trained in place: byte-level BPE with ChatML, and a SentencePiece BPE model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from minicpm.tokenizer import Tokenizer

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LINES = [
    "The quick brown fox jumps over the lazy dog, and it's 2024 already.",
    "def f(x):\n\n    return x  # a  comment\twith tabs",
    "山东省最高的山是泰山,海拔1545米。相对于黄山,泰山海拔较低。",
    "user assistant system You are a helpful assistant",
    "<p>HTML & <h2>tags</h2> = < > / | im _ start end</p> <AI> <用户>",
    "émigré naïve 🤗 🚀 Ünïcode",
]


@pytest.fixture(scope="session")
def bpe_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.json`: byte-level BPE, digits apart, three control tokens and one user-defined one."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=CONTROLS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES * 4, trainer)
    backend.add_tokens(["<tool_call>"])
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="session")
def bpe_folder(bpe_json: Path) -> Path:
    """The same as a model folder."""
    folder = bpe_json.parent
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def bpe(bpe_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(bpe_folder)


@pytest.fixture(scope="session")
def spm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model with the settings of MiniCPM's: identity, byte fallback, user-defined pieces."""
    return train_spm(tmp_path_factory.mktemp("spm") / "tokenizer.model", normalization_rule_name="identity")


@pytest.fixture(scope="session")
def spm(spm_model: Path) -> Tokenizer:
    return Tokenizer.from_sentencepiece(spm_model)


@pytest.fixture(scope="session")
def train_sentencepiece() -> Callable[..., Path]:
    return train_spm


def train_spm(path: Path, **settings: object) -> Path:
    buffer = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 440,
        "byte_fallback": True,
        "split_digits": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["\n", "\t", "<h2>"],
        "hard_vocab_limit": False,
        "minloglevel": 2,
        **settings,
    }
    lines = (line for text in LINES * 4 for line in text.split("\n"))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=buffer, **options)
    path.write_bytes(buffer.getvalue())
    return path
