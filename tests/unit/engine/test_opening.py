"""`minicpm.load`: a file becomes a model that answers, or one line says why not; and what importing costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.reference import ReferenceDecoder, log_softmax, random_weights
from tests.unit.engine.tiny import tiny_tokenizer

import minicpm
from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.engine import assembly, opening
from minicpm.errors import CheckpointError, EngineError, HubError
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.hf_config import config_to_hf
from minicpm.formats.safetensors_write import write_safetensors_model
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry


def random_entries(config: ModelConfig) -> dict[str, WeightEntry]:
    def entry(array: Any) -> WeightEntry:
        return WeightEntry(array.shape, "F32", lambda: Weight.from_array(array))

    return {name: entry(array) for name, array in random_weights(config).items()}


def write_file(path: Path, config: ModelConfig) -> Path:
    """Write a tiny random model with the tiny tokenizer as a GGUF file."""
    write_gguf_model(path, config, random_entries(config), tiny_tokenizer().to_gguf_metadata())
    return path


def write_folder(folder: Path, config: ModelConfig) -> Path:
    """Write the same as a folder."""
    folder.mkdir()
    write_safetensors_model(folder, random_entries(config))
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    (folder / "tokenizer.json").write_text(tiny_tokenizer().to_json())
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>", "eos_token": "</s>"}')
    return folder


@pytest.fixture
def path(tmp_path: Path, tiny_config: ModelConfig) -> Path:
    return write_file(tmp_path / "tiny.gguf", tiny_config)


def test_a_file_becomes_a_model(path: Path, tiny_config: ModelConfig) -> None:
    with minicpm.load(path) as model:
        assert isinstance(model, minicpm.LanguageModel)
        assert model.context_length == tiny_config.max_position_embeddings
        assert model.engine.limits.max_parallel == 16
        assert model.engine.load.num_blocks == 16 * 512 // 32
        ids = model.tokenizer.encode("hello")
        assert ids == tiny_tokenizer().encode("hello")
        truth = log_softmax(ReferenceDecoder(tiny_config, random_weights(tiny_config)).full_logits(ids))[-1]
        assert model.next_logprobs(ids) == pytest.approx(truth, abs=1e-3)
        assert model.chat("hello", max_new_tokens=3)[0]


def test_a_text_is_a_path_too_and_settings_are_kept(path: Path) -> None:
    with minicpm.load(str(path), context_length=100, num_threads=1, max_parallel=2, kv_cache_tokens=150) as model:
        assert model.context_length == 100
        assert model.engine.load.num_blocks == 5
        assert model.engine.limits.max_parallel == 2
        with pytest.raises(EngineError, match="the context holds 100"):
            model.generate("x" * 200)


@pytest.mark.parametrize(("kv_type", "head_bytes"), [("f32", 64), ("f16", 32), ("q8", 20)])
def test_the_kv_type_decides_what_the_cache_takes(
    path: Path, tiny_config: ModelConfig, kv_type: str, head_bytes: int
) -> None:
    tokens = 5 * 32
    with minicpm.load(path, context_length=100, kv_cache_tokens=tokens, kv_type=kv_type) as model:
        heads = 2 * tiny_config.num_hidden_layers * tiny_config.num_key_value_heads
        assert model.engine.prefixes.block_bytes * 5 == tokens * heads * head_bytes
        assert f"KV cache {kv_type}" in model.dtypes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 0}, "context_length must be 1 to 512, .* got 0"),
        ({"context_length": 1_000_000}, "1 to 512, .* got 1000000"),
        ({"num_threads": -3}, "num_threads must be 1 to 1024, got -3"),
        ({"max_parallel": 0}, "max_parallel must be at least 1, got 0"),
        ({"kv_type": "q4"}, "kv_type 'q4' is unknown; known: f16, bf16, f32, q8"),
        ({"kv_cache_tokens": 100}, "at least the context of 512"),
        ({"kv_cache_tokens": 10**13}, "takes .* MB and .* MB are left"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(path: Path, options: dict[str, Any], message: str) -> None:
    if "kv_cache_tokens" in options:
        options = {"context_length": 512} | options
    with pytest.raises(EngineError, match=message):
        minicpm.load(path, **options)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "free_memory", lambda: 1_000_000)
    with pytest.raises(EngineError, match="the weights take 2 MB and 1 MB of memory are free"):
        minicpm.load(path)


def test_a_folder_becomes_the_same_model(path: Path, tmp_path: Path, tiny_config: ModelConfig) -> None:
    folder = write_folder(tmp_path / "model", tiny_config)
    with minicpm.load(path) as file_model, minicpm.load(folder) as folder_model:
        assert folder_model.next_logprobs("hello") == pytest.approx(file_model.next_logprobs("hello"), abs=1e-4)


def test_dynamic_scaling_is_that_of_the_whole_context(tmp_path: Path, tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(max_position_embeddings=64, rope_scaling=RopeScaling("dynamic", 4.0))
    ids = list(range(3, 60))
    reference = ReferenceDecoder(config, random_weights(config), num_positions=200)
    with minicpm.load(write_folder(tmp_path / "model", config), context_length=200) as model:
        truth = log_softmax(reference.full_logits(ids))[-1]
        assert model.next_logprobs(ids) == pytest.approx(truth, abs=1e-3)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path, tiny_config: ModelConfig) -> None:
    path = write_folder(tmp_path / "model", tiny_config.replace(vocab_size=330))
    with pytest.raises(CheckpointError, match="the tokenizer has 331 tokens, the model only 330"):
        minicpm.load(path)


def test_errors_of_the_tokenizer_reach_the_caller(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(metadata: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(opening.Tokenizer, "from_gguf", broken)
    with pytest.raises(ZeroDivisionError):
        minicpm.load(path)


def test_a_name_that_means_nothing() -> None:
    with pytest.raises(HubError, match="no model named 'nothing-of-that-name'"):
        minicpm.load("nothing-of-that-name")


def test_importing_the_engine_loads_nothing_slow() -> None:
    slow = {"torch", "tokenizers", "jinja2", "hashlib", "rich", "typer", "numpy.random", "minicpm.tokenizer"}
    code = f"import sys, minicpm.engine; print(sorted({slow!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
