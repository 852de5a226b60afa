"""Any format into any other and back: the same names, shapes, configuration and bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.formats.model_files import as_llama, random_entries, vocabulary

from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.formats import blocks
from minicpm.formats.blocks import BLOCK_TYPES
from minicpm.formats.checkpoint import Checkpoint, open_checkpoint
from minicpm.formats.decimals import shortest_decimal
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.hf_config import config_to_hf
from minicpm.formats.safetensors_write import write_safetensors_model


def to_folder(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    folder.mkdir()
    write_safetensors_model(folder, checkpoint.weights.entries, max_shard_bytes=100_000)
    (folder / "config.json").write_text(json.dumps(config_to_hf(checkpoint.config)))
    return open_checkpoint(folder)


def to_gguf(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    write_gguf_model(path, checkpoint.config, checkpoint.weights.entries, checkpoint.metadata)
    return open_checkpoint(path)


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0), RopeScaling("llama3", 8.0, 64, 1.0, 4.0)])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("model_type", ["minicpm", "granite", "llama"])
@pytest.mark.parametrize("block_type", ["BF16", "F16", "F32"])
def test_gguf_to_folder_to_gguf(
    tmp_path: Path,
    tiny_config: ModelConfig,
    model_type: str,
    is_tied: bool,
    block_type: str,
    scaling: RopeScaling | None,
) -> None:
    dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[block_type]
    config = tiny_config.replace(
        tie_word_embeddings=is_tied, torch_dtype=dtype, rope_scaling=scaling, num_hidden_layers=2
    )
    config = as_llama(config) if model_type == "llama" else config.replace(model_type=model_type)
    write_gguf_model(tmp_path / "a.gguf", config, random_entries(config, block_type), vocabulary(331))
    first = open_checkpoint(tmp_path / "a.gguf")
    folder = to_folder(first, tmp_path / "folder")
    last = to_gguf(folder, tmp_path / "b.gguf")
    assert first.config == folder.config == last.config == config
    assert list(first.weights) == list(folder.weights) == list(last.weights)
    for name, weight in first.weights.items():
        for other in (folder, last):
            assert other.weights[name].block_type == weight.block_type
            assert np.array_equal(other.weights[name].data, weight.data), name


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_quantized_rows_move_without_rounding(tmp_path: Path, tiny_config: ModelConfig, block_type: str) -> None:
    config = tiny_config.replace(hidden_size=256, intermediate_size=256, head_dim=64, num_attention_heads=4)
    config = config.replace(num_hidden_layers=1)
    entries = random_entries(config, block_type)
    write_gguf_model(tmp_path / "a.gguf", config, entries)
    again = to_gguf(open_checkpoint(tmp_path / "a.gguf"), tmp_path / "b.gguf")
    to_gguf(again, tmp_path / "c.gguf")
    for name, entry in entries.items():
        assert np.array_equal(again.weights[name].data, entry.make().data), name
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_the_default_model_written_again(tmp_path: Path, smollm2_path: Path) -> None:
    original = open_checkpoint(smollm2_path)
    again = to_gguf(original, tmp_path / "a.gguf")
    assert again.config == original.config
    assert dict(again.metadata) == dict(original.metadata)
    for name, weight in original.weights.items():
        assert np.array_equal(again.weights[name].data, weight.data), name


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    name=st.sampled_from(sorted(BLOCK_TYPES)),
    rows=st.integers(1, 4),
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-2, 2),
    seed=st.integers(0, 1 << 31),
)
def test_no_weight_moves_further_than_its_type_allows(
    name: str, rows: int, scale: float, offset: float, seed: int
) -> None:
    kind = BLOCK_TYPES[name]
    values = (scale * (np.random.default_rng(seed).standard_normal((rows, 512)) + offset)).astype(np.float32)
    decoded = blocks.decode(name, blocks.encode(name, values))
    span = np.ptp(np.concatenate([values, np.zeros((rows, 1))], axis=1), axis=1, keepdims=True)
    levels = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q4_K": 8, "Q5_K": 16, "Q6_K": 24}
    assert (np.abs(decoded - values) <= 1.1 * span / levels.get(name, 250) + 1e-7).all()
    assert kind.row_bytes(512) == blocks.encode(name, values).shape[1]


@given(st.floats(1e-6, 1e6), st.integers(1, 100))
def test_the_shortest_decimal_fits(value: float, layers: int) -> None:
    stored = np.float32(value / layers**0.5)
    found = shortest_decimal(float(stored) * layers**0.5, lambda depth: np.float32(depth / layers**0.5) == stored)
    assert np.float32(found / layers**0.5) == stored
    written = float(f"{value:.4g}")
    stored = np.float32(written / layers**0.5)
    found = shortest_decimal(float(stored) * layers**0.5, lambda depth: np.float32(depth / layers**0.5) == stored)
    assert found == written
