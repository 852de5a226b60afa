"""GGUF metadata to configuration and back: numbers as they were meant, defaults of old files, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.formats.model_files import as_llama

from minicpm.architecture import PRESETS, ModelConfig, RopeScaling
from minicpm.errors import ConfigError, FormatError
from minicpm.formats.gguf_config import config_from_gguf, config_to_gguf
from minicpm.formats.gguf_read import open_gguf
from minicpm.formats.gguf_write import write_gguf
from minicpm.formats.rope_factors import frequency_divisors


def stored(config: ModelConfig, path: Path) -> dict[str, Any]:
    """The metadata after a file's float32."""
    write_gguf(path / "a.gguf", config_to_gguf(config), {})
    return dict(open_gguf(path / "a.gguf").metadata)


def read(metadata: dict[str, Any], config: ModelConfig, divisors: Any = None) -> ModelConfig:
    return config_from_gguf(
        metadata,
        vocab_size=config.vocab_size,
        is_tied=config.tie_word_embeddings,
        rope_divisors=divisors,
        torch_dtype=config.torch_dtype,
    ).replace(initializer_range=config.initializer_range)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_come_back_to_the_digit(preset: str, tmp_path: Path) -> None:
    config = PRESETS[preset]
    metadata = stored(config, tmp_path)
    assert metadata["minicpm.logit_scale"] == np.float32(config.hidden_size / 256)
    assert metadata["minicpm.residual_scale"] == np.float32(1.4 / config.num_hidden_layers**0.5)
    assert metadata["minicpm.embedding_scale"] == 12
    assert read(metadata, config) == config


@pytest.mark.parametrize("depth", [1.4, 0.1, 1.37, 2.25, 1.0, 3.14159])
def test_scales_other_than_the_usual(tiny_config: ModelConfig, tmp_path: Path, depth: float) -> None:
    config = tiny_config.replace(
        scale_depth=depth, dim_model_base=17.0, scale_emb=7.3, rope_theta=1e6, rms_norm_eps=1e-6
    )
    assert read(stored(config, tmp_path), config) == config


def test_granite_and_llama(tiny_config: ModelConfig, tmp_path: Path) -> None:
    granite = tiny_config.replace(model_type="granite", attention_multiplier=0.3, eos_token_id=(2, 5), pad_token_id=0)
    assert read(stored(granite, tmp_path), granite) == granite
    llama = as_llama(tiny_config).replace(bos_token_id=None, head_dim=24)
    metadata = stored(llama, tmp_path)
    assert not [key for key in metadata if "scale" in key]
    assert (metadata["llama.attention.key_length"], metadata["llama.rope.dimension_count"]) == (24, 24)
    assert read(metadata, llama) == llama


def test_files_of_the_first_converter_name_no_scales(tmp_path: Path) -> None:
    config = PRESETS["minicpm-2b"]
    metadata = {key: value for key, value in stored(config, tmp_path).items() if not key.endswith("_scale")}
    assert read(metadata, config) == config
    assert read(metadata | {"minicpm.block_count": 30}, config).scale_depth == 1.4
    wide = read(metadata | {"minicpm.embedding_length": 4608, "minicpm.rope.dimension_count": 128}, config)
    assert wide.dim_model_base == 256


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 2.0),
        RopeScaling("llama3", 8.0, 256, 1.0, 4.0),
        RopeScaling("ntk_by_parts", 4.0, 128, 1.5, 30.0),
        RopeScaling("ntk_by_parts", 4.0),
    ],
)
def test_rope_scaling(tiny_config: ModelConfig, tmp_path: Path, scaling: RopeScaling) -> None:
    config = tiny_config.replace(rope_scaling=scaling)
    divisors = None if scaling.rope_type == "linear" else frequency_divisors(config)
    if divisors is not None:
        assert divisors[0] < 1.4
        assert divisors[-1] > 3
    assert read(stored(config, tmp_path), config, divisors) == config


def test_a_llama3_file_of_others_keeps_the_tensor_only(tiny_config: ModelConfig, tmp_path: Path) -> None:
    config = as_llama(tiny_config).replace(rope_theta=5e5, rope_scaling=RopeScaling("llama3", 32.0, 8192, 1.0, 4.0))
    metadata = stored(config.replace(rope_scaling=None), tmp_path)
    divisors = frequency_divisors(config)
    assert read(metadata, config, divisors) == config
    assert read(metadata, config, np.ones(8, np.float32)).rope_scaling is None
    with pytest.raises(FormatError, match="holds divisors that neither llama3 nor ntk_by_parts gives"):
        read(metadata, config, divisors[::-1].copy())
    with pytest.raises(FormatError, match="holds divisors"):
        read(metadata, config, np.full(8, np.nan, np.float32))
    with pytest.raises(FormatError, match=r"has shape \(9,\), expected \(8,\)"):
        read(metadata, config, np.ones(9, np.float32))


BROKEN = {
    "architecture": ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not supported; known: minicpm, llama"),
    "no architecture": ({"general.architecture": None}, "architecture None is not supported"),
    "missing": ({"minicpm.block_count": ...}, "the metadata key minicpm.block_count is missing"),
    "text": ({"minicpm.block_count": "5"}, "minicpm.block_count must be one whole number, got '5'"),
    "truth": ({"minicpm.embedding_length": True}, "must be one whole number, got True"),
    "negative": ({"minicpm.context_length": -1}, "must be one whole number, got -1"),
    "layers differ": ({"minicpm.feed_forward_length": [160, 160, 170, 160, 160]}, r"got \[160, 160, 170, 160, …\]"),
    "experts": ({"minicpm.expert_count": 8}, "mixtures of experts are not supported"),
    "no heads": ({"minicpm.attention.head_count": 0, "minicpm.rope.dimension_count": 96}, "num_attention_heads must"),
    "heads": ({"minicpm.attention.head_count_kv": 4}, "no multiple of num_key_value_heads 4"),
    "partial rope": ({"minicpm.rope.dimension_count": 8}, "rope.dimension_count must equal the head width 16, got 8"),
    "values": ({"minicpm.attention.value_length": 32}, "attention.value_length must equal the head width 16"),
    "yarn": ({"minicpm.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
    "no tensor": ({"minicpm.rope.scaling.type": "llama3"}, "without the tensor rope_freqs.weight"),
    "zero": ({"minicpm.logit_scale": 0.0}, "logit_scale 0.0 is no number or 0"),
    "NaN": ({"minicpm.residual_scale": float("nan")}, "scale_depth must be a positive number, got nan"),
    "infinity": ({"minicpm.embedding_scale": float("inf")}, "scale_emb must be a positive number, got inf"),
    "epsilon": ({"minicpm.attention.layer_norm_rms_epsilon": "1e-5"}, "epsilon must be a number, got '1e-5'"),
    "attention": ({"minicpm.attention.scale": 0.2}, "minicpm.attention.scale is not supported"),
    "eos": ({"tokenizer.ggml.eos_token_id": 331}, "eos_token_id must be an id below 331, got 331"),
    "bos": ({"tokenizer.ggml.bos_token_id": 1.0}, "bos_token_id must be an id below 331, got 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_metadata_names_the_key(tiny_config: ModelConfig, case: str) -> None:
    changes, message = BROKEN[case]
    metadata = config_to_gguf(tiny_config) | changes
    with pytest.raises(FormatError, match=f"GGUF: .*{message}"):
        read({key: value for key, value in metadata.items() if value is not ...}, tiny_config)


def test_granite_without_rope_is_refused(tiny_config: ModelConfig) -> None:
    metadata = config_to_gguf(tiny_config.replace(model_type="granite")) | {"granite.rope.scaling.finetuned": False}
    with pytest.raises(FormatError, match="models without rope"):
        read(metadata, tiny_config)


def test_layers_that_agree_and_old_linear_scaling(tiny_config: ModelConfig) -> None:
    metadata = config_to_gguf(tiny_config) | {
        "minicpm.feed_forward_length": [160] * 5,
        "minicpm.rope.scale_linear": 4.0,
    }
    config = read(metadata, tiny_config)
    assert config.intermediate_size == 160
    assert config.rope_scaling == RopeScaling("linear", 4.0)


def test_token_ids_that_end_a_text(tiny_config: ModelConfig) -> None:
    metadata = config_to_gguf(tiny_config)
    end = {f"tokenizer.ggml.{name}_token_id": value for name, value in (("eos", 2), ("eot", 7), ("eom", 2))}
    assert read(metadata | end, tiny_config).eos_token_id == (2, 7)
    bare = {key: value for key, value in metadata.items() if "_token_id" not in key}
    assert read(bare, tiny_config).eos_token_id == ()
    assert read(bare | {"tokenizer.ggml.model": "llama"}, tiny_config).eos_token_id == (2,)


def test_what_a_file_cannot_express(tiny_config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="a llama GGUF has no scales"):
        config_to_gguf(tiny_config.replace(model_type="llama"))
    with pytest.raises(ConfigError, match="write granite instead"):
        config_to_gguf(tiny_config.replace(attention_multiplier=0.5))
    with pytest.raises(ConfigError, match="cannot express dynamic rope scaling"):
        config_to_gguf(tiny_config.replace(rope_scaling=RopeScaling("dynamic", 2.0)))
