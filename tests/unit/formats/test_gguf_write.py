from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.formats.model_files import entries_of, random_entries, vocabulary

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, FormatError
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.gguf_read import open_gguf
from minicpm.formats.gguf_write import write_gguf, write_gguf_model
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the metadata key 'k' holds None"),
        ({"a": 1}, "GGUF holds text, numbers, lists"),
        ([1, "a"], "the metadata key 'k' holds 1"),
        ([True, 1], "the metadata key 'k' holds True"),
        (1 << 64, "GGUF holds at most 64 bits"),
        (-(1 << 63) - 1, "GGUF holds at most 64 bits"),
        (np.array([1j]), "has dtype complex128"),
        ("\ud800", "cannot be written as UTF-8"),
    ],
)
def test_values_that_gguf_cannot_hold(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        write_gguf(tmp_path / "a.gguf", {"k": value}, {})
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_not_what_was_announced_leaves_nothing(tmp_path: Path) -> None:
    weight = Weight.from_array(np.ones((2, 32), np.float32))
    for entry in (WeightEntry((2, 32), "F16", lambda: weight), WeightEntry((32, 2), "F32", lambda: weight)):
        with pytest.raises(CheckpointError, match="t was announced as F"):
            write_gguf(tmp_path / "a.gguf", {}, {"t": entry})
        assert not list(tmp_path.iterdir())


def test_only_one_weight_is_alive(tmp_path: Path, tiny_config: ModelConfig) -> None:
    alive, most = 0, 0
    weights = {name: entry.make() for name, entry in random_entries(tiny_config).items()}

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= getattr(self, "is_counted", False)

    def make(weight: Weight) -> Weight:
        nonlocal alive, most
        data = weight.data.copy().view(Counted)
        data.is_counted = True
        alive += 1
        most = max(most, alive)
        return Weight(weight.block_type, weight.shape, data)

    entries = {n: WeightEntry(w.shape, w.block_type, lambda w=w: make(w)) for n, w in weights.items()}
    write_gguf_model(tmp_path / "a.gguf", tiny_config, entries)
    assert most == 1


def test_a_model_says_what_it_is(tmp_path: Path, tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(eos_token_id=(2, 5), tie_word_embeddings=False)
    stale = {
        "general.name": "a name", "general.alignment": 64, "general.architecture": "llama", "llama.block_count": 9,
        "tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eom_token_id": 8, "split.count": 1,
    }  # fmt: skip
    write_gguf_model(tmp_path / "a.gguf", config, random_entries(config, "Q8_0"), vocabulary(331) | stale)
    file = open_gguf(tmp_path / "a.gguf")
    assert next(iter(file.metadata)) == "general.architecture"
    assert file.metadata["general.architecture"] == "minicpm"
    assert (file.metadata["general.name"], file.metadata["general.file_type"]) == ("a name", 7)
    assert file.metadata["general.quantization_version"] == 2
    assert (file.metadata["tokenizer.ggml.eos_token_id"], file.metadata["tokenizer.ggml.eot_token_id"]) == (2, 5)
    assert not {"general.alignment", "llama.block_count", "tokenizer.ggml.eom_token_id"} & set(file.metadata)
    assert {"minicpm.embedding_scale", "minicpm.residual_scale", "minicpm.logit_scale"} <= set(file.metadata)
    assert file.tensors["output.weight"].block_type == "Q8_0"
    assert {info.block_type for info in file.tensors.values() if len(info.shape) == 1} == {"F32"}
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert checkpoint.config.eos_token_id == (2, 5)
    assert checkpoint.chat_template == vocabulary(331)["tokenizer.chat_template"]
    assert checkpoint.metadata["tokenizer.ggml.tokens"] == vocabulary(331)["tokenizer.ggml.tokens"]


def test_half_precision_vectors_become_f32(tmp_path: Path, tiny_config: ModelConfig) -> None:
    entries = random_entries(tiny_config)
    half = {name: entry.make().encode("BF16") for name, entry in entries.items()}
    announced = {n: WeightEntry(w.shape, "BF16", lambda w=w: w) for n, w in half.items()}
    write_gguf_model(tmp_path / "a.gguf", tiny_config, announced)
    file = open_gguf(tmp_path / "a.gguf")
    norm = file.weight("output_norm.weight")
    assert norm.block_type == "F32"
    assert np.array_equal(norm.decode(), half["model.norm.weight"].decode())
    assert file.metadata["general.file_type"] == 32


def test_the_size_is_the_sum_of_blocks_to_the_byte(tmp_path: Path, tiny_config: ModelConfig) -> None:
    write_gguf_model(tmp_path / "a.gguf", tiny_config, random_entries(tiny_config, "Q4_0"))
    file = open_gguf(tmp_path / "a.gguf")
    counts = tiny_config.num_parameters()
    data = sum(info.num_bytes for info in file.tensors.values())
    assert data == (counts.linear + counts.embedding) // 32 * 18 + 4 * counts.norms
    last = max(file.tensors.values(), key=lambda info: info.offset)
    assert (tmp_path / "a.gguf").stat().st_size == -(-(last.offset + last.num_bytes) // 32) * 32


def test_a_weight_of_no_gguf_name(tmp_path: Path, tiny_config: ModelConfig) -> None:
    entries = entries_of({"model.layers.0.self_attn.q_proj.bias": np.ones(8, np.float32)})
    with pytest.raises(FormatError, match=r"'model.layers.0.self_attn.q_proj.bias' has no name in GGUF"):
        write_gguf_model(tmp_path / "a.gguf", tiny_config, entries)
