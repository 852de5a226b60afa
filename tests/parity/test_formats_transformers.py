"""Against `safetensors` and transformers: their files and folders are read, ours load there without a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.formats.model_files import as_llama, entries_of, random_entries

from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.hf_config import config_to_hf
from minicpm.formats.safetensors_read import open_safetensors
from minicpm.formats.safetensors_write import write_safetensors, write_safetensors_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

FAMILIES = {"llama": "Llama", "granite": "Granite"}
SCALINGS = [None, RopeScaling("linear", 2.0), RopeScaling("dynamic", 2.0), RopeScaling("llama3", 8.0, 64, 1.0, 4.0)]


def family(config: ModelConfig, model_type: str) -> ModelConfig:
    return as_llama(config) if model_type == "llama" else config.replace(model_type=model_type)


def as_tensor(weight: Any) -> Any:
    return torch.from_numpy(weight.decode()).to(getattr(torch, {"BF16": "bfloat16"}.get(weight.block_type, "float32")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_files_of_the_library(tmp_path: Path, dtype: str) -> None:
    tensors = {f"t{i}": torch.randn(3, i + 1).to(getattr(torch, dtype)) for i in range(5)}
    safetensors_torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "词": "x"})
    file = open_safetensors(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt", "词": "x"}
    for name, tensor in tensors.items():
        assert np.array_equal(file.weight(name).decode(), tensor.float().numpy())


@pytest.mark.parametrize("block_type", ["BF16", "F16", "F32"])
def test_the_library_on_our_files(tmp_path: Path, tiny_config: ModelConfig, block_type: str) -> None:
    entries = random_entries(tiny_config, block_type)
    write_safetensors(tmp_path / "a.safetensors", entries)
    read = safetensors_torch.load_file(tmp_path / "a.safetensors")
    assert set(read) == set(entries)
    for name, entry in entries.items():
        assert np.array_equal(read[name].float().numpy(), entry.make().decode())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_folders_of_transformers(
    tmp_path: Path, tiny_config: ModelConfig, model_type: str, scaling: RopeScaling | None
) -> None:
    config = family(tiny_config, model_type).replace(rope_scaling=scaling, rope_theta=5e5, eos_token_id=(2, 7))
    theirs = getattr(transformers, f"{FAMILIES[model_type]}Config")(**config_to_hf(config))
    model = getattr(transformers, f"{FAMILIES[model_type]}ForCausalLM")(theirs).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="150KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    state = model.state_dict()
    for name, weight in checkpoint.weights.items():
        assert torch.equal(as_tensor(weight), state[name]), name
    assert set(state) - set(checkpoint.weights) <= {"lm_head.weight"}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_on_our_folders(
    tmp_path: Path, tiny_config: ModelConfig, model_type: str, scaling: RopeScaling | None
) -> None:
    """Warnings are errors here; the rotary frequencies are its own reading of our configuration."""
    config = family(tiny_config, model_type).replace(rope_scaling=scaling, rope_theta=5e5)
    entries = random_entries(config, "BF16")
    # As our trainer writes them; its norms are in the dtype of the rest.
    entries = entries_of({name: entry.make().decode() for name, entry in entries.items()}, "BF16")
    write_safetensors_model(tmp_path, entries, max_shard_bytes=100_000)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(model).__name__ == f"{FAMILIES[model_type]}ForCausalLM"
    for name, entry in entries.items():
        assert np.array_equal(model.state_dict()[name].numpy(), entry.make().decode()), name
    frequencies = model.model.rotary_emb.inv_freq.double().numpy()
    np.testing.assert_allclose(frequencies, config.rope_frequencies(), rtol=1e-6)
    if model_type == "granite":
        read = model.config
        assert (read.embedding_multiplier, read.logits_scaling) == (12.0, 4.0)
        assert (read.residual_multiplier, read.attention_multiplier) == (1.4 / 5**0.5, 0.25)
