"""config.json to configuration and back: defaults of the classes, both spellings of rope, refusals."""

import json
from typing import Any

import pytest
from tests.unit.formats.model_files import as_llama

from minicpm.architecture import PRESETS, ModelConfig, RopeScaling
from minicpm.errors import ConfigError
from minicpm.formats.hf_config import config_from_hf, config_to_hf

# As OpenBMB published it: no rope_theta, no tie_word_embeddings.
MINICPM_2B = {
    "architectures": ["MiniCPMForCausalLM"], "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"},
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2304, "initializer_range": 0.1,
    "intermediate_size": 5760, "max_position_embeddings": 4096, "model_type": "minicpm", "num_attention_heads": 36,
    "num_hidden_layers": 40, "num_key_value_heads": 36, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": True, "vocab_size": 122753,
    "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4,
}  # fmt: skip
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def smallest(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type, **{key: MINICPM_2B[key] for key in SIZES}}


def test_the_published_2b() -> None:
    assert config_from_hf(MINICPM_2B) == PRESETS["minicpm-2b"]


def test_what_a_family_makes_of_missing_keys() -> None:
    minicpm, llama, granite = (config_from_hf(smallest(kind)) for kind in ("minicpm", "llama", "granite"))
    for config in (minicpm, llama, granite):
        assert (config.rope_theta, config.rms_norm_eps, config.num_key_value_heads) == (1e4, 1e-6, 36)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, (2,), None)
        assert config.max_position_embeddings == 2048
    assert (minicpm.tie_word_embeddings, llama.tie_word_embeddings, granite.tie_word_embeddings) == (True, False, False)
    assert (minicpm.scale_emb, minicpm.scale_depth, minicpm.dim_model_base) == (1, 1, 1)
    assert (llama.scale_emb, llama.residual_scale, llama.logit_divisor, llama.attention_scale) == (1, 1, 1, 0.125)
    assert (granite.residual_scale, granite.logit_divisor, granite.attention_scale) == (1, 1, 1)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model_type", ["minicpm", "granite"])
def test_presets_come_back_to_the_digit(preset: str, model_type: str) -> None:
    config = PRESETS[preset].replace(model_type=model_type)
    values = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(values) == config
    if model_type == "granite":
        assert values["residual_multiplier"] == 1.4 / config.num_hidden_layers**0.5
        assert values["logits_scaling"] == config.hidden_size / 256
        assert values["attention_multiplier"] == 0.125


def test_odd_ones_come_back(tiny_config: ModelConfig) -> None:
    granite = tiny_config.replace(model_type="granite", attention_multiplier=0.3, eos_token_id=(2, 7), pad_token_id=0)
    assert config_from_hf(config_to_hf(granite)) == granite
    llama = as_llama(tiny_config).replace(head_dim=24, eos_token_id=(), bos_token_id=None, torch_dtype="float16")
    assert config_from_hf(config_to_hf(llama)) == llama
    wide = tiny_config.replace(head_dim=24)
    assert config_from_hf(config_to_hf(wide)) == wide
    assert "head_dim" not in config_to_hf(tiny_config)


@pytest.mark.parametrize("model_type", ["minicpm", "llama", "granite"])
@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 2.5),
        RopeScaling("dynamic", 2.0),
        RopeScaling("dynamic", 2.0, 128),
        RopeScaling("llama3", 8.0, 256, 1.0, 4.0),
        RopeScaling("ntk_by_parts", 4.0, 128, 1.5, 30.0),
    ],
)
def test_rope_scaling(tiny_config: ModelConfig, model_type: str, scaling: RopeScaling) -> None:
    config = (as_llama(tiny_config) if model_type == "llama" else tiny_config.replace(model_type=model_type)).replace(
        rope_scaling=scaling
    )
    values = config_to_hf(config)
    assert config_from_hf(values) == config
    # The spelling of transformers 5.
    inner = {key.replace("type", "rope_type") if key == "type" else key: v for key, v in values["rope_scaling"].items()}
    del values["rope_scaling"]
    late = values | {"rope_parameters": inner | {"rope_theta": values.pop("rope_theta")}}
    assert config_from_hf(late) == config


def test_spellings_of_the_ordinary_rope() -> None:
    plain = smallest("llama")
    for extra in (
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": None, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    ):
        config = config_from_hf(plain | extra)
        assert config.rope_scaling is None
        assert config.rope_theta == (5e5 if "5" in str(extra) else 1e4)


def test_minicpm_writes_what_its_own_class_accepts(tiny_config: ModelConfig) -> None:
    values = config_to_hf(tiny_config.replace(rope_scaling=RopeScaling("linear", 2.0)))
    assert values["rope_scaling"] == {"type": "linear", "factor": 2.0}


BROKEN = {
    "type": ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported; known: minicpm, llama, granite"),
    "no type": ({"model_type": None}, "model_type None is not supported"),
    "missing": ({"hidden_size": None}, "hidden_size is missing"),
    "text": ({"num_hidden_layers": "40"}, "num_hidden_layers must be a whole number, got '40'"),
    "truth": ({"vocab_size": True}, "vocab_size must be a whole number, got True"),
    "huge": ({"vocab_size": 1 << 40}, "vocab_size must be a whole number"),
    "number": ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
    "experts": ({"num_experts": 8}, "num_experts 8 is not supported: mixtures of experts"),
    "local experts": ({"num_local_experts": 8}, "mixtures of experts"),
    "bias": ({"attention_bias": True}, "attention_bias True is not supported: the network has no biases"),
    "activation": ({"hidden_act": "fatrelu"}, "hidden_act 'fatrelu' is not supported: the feed-forward layer is SiLU"),
    "quantized": ({"quantization_config": {"bits": 4}}, "GGUF holds quantized ones"),
    "tie": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    "dtype": ({"torch_dtype": "float8"}, "torch_dtype 'float8' is not supported; known: float32, float16, bfloat16"),
    "rope": ({"rope_scaling": [1]}, r"rope_scaling must be an object, got \[1\]"),
    "rope type": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling type 'yarn' is not supported"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
    "rope small": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1"),
    "eos": ({"eos_token_id": [2, "x"]}, "eos_token_id must be a token id or a list of them"),
    "bos": ({"bos_token_id": -2}, "bos_token_id must be a token id"),
    "scale": ({"scale_emb": [12]}, r"scale_emb must be a number, got \[12\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_names_the_key(case: str) -> None:
    changes, message = BROKEN[case]
    with pytest.raises(ConfigError, match=f"some/config.json: .*{message}"):
        config_from_hf(MINICPM_2B | changes, "some/config.json")


def test_what_a_family_cannot_express(tiny_config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="model type llama has no scales"):
        config_to_hf(tiny_config.replace(model_type="llama"))
    with pytest.raises(ConfigError, match="minicpm has no attention_multiplier"):
        config_to_hf(tiny_config.replace(attention_multiplier=0.5))
    with pytest.raises(ConfigError, match="logits_scaling must not be 0"):
        config_from_hf(smallest("granite") | {"logits_scaling": 0})
