"""HF `config.json` <-> `ModelConfig`, for the model types minicpm, llama and granite.

Keys that a file leaves out mean what the family's own configuration class makes of them. A key that would change the
network in a way that the decoder graph does not know is an error, never ignored. What this leaves out: reading the
file, and `auto_map` (no code from a model folder is ever run).

Source: OpenBMB/MiniCPM `configuration_minicpm.py`; transformers `LlamaConfig`, `GraniteConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minicpm.architecture import MODEL_TYPES, ModelConfig, RopeScaling
from minicpm.errors import ConfigError
from minicpm.formats.decimals import shortest_decimal
from minicpm.formats.typed_fields import TypedFields

ARCHITECTURES: Mapping[str, str] = {
    "minicpm": "MiniCPMForCausalLM",
    "llama": "LlamaForCausalLM",
    "granite": "GraniteForCausalLM",
}
DTYPES = ("float32", "float16", "bfloat16")
_IS_TIED_BY_DEFAULT: Mapping[str, bool] = {"minicpm": True, "llama": False, "granite": False}
# Key -> (the values that change nothing, what to say of any other).
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "the feed-forward layer is SiLU only"),
    "attention_bias": ((False, None), "the network has no biases"),
    "mlp_bias": ((False, None), "the network has no biases"),
    "num_experts": ((0, None), "mixtures of experts are not supported"),
    "num_local_experts": ((0, None), "mixtures of experts are not supported"),
    "partial_rotary_factor": ((1, None), "rope turns whole heads only"),
    "quantization_config": ((None,), "only float weights are read from folders; GGUF holds quantized ones"),
    "qk_norm": ((False, None), "queries and keys are not normalised"),
}


def config_from_hf(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Return the configuration in a parsed `config.json`.

    Args:
        values: the JSON object.
        where: the file's name for messages.

    Raises:
        ConfigError: unknown model type, a missing or mistyped key, or a feature that is not supported.
    """
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"{where}: model_type {model_type!r} is not supported; known: {', '.join(MODEL_TYPES)}")
    for key, (accepted, reason) in _NEUTRAL.items():
        if key in values and values[key] not in accepted:
            raise ConfigError(f"{where}: {key} {_brief(values[key])} is not supported: {reason}")
    fields = TypedFields(values, where)
    heads = fields.integer("num_attention_heads")
    rope = fields.section("rope_parameters")
    rope_fields = TypedFields(rope, f"{where}: rope_parameters") if "rope_theta" in rope else fields
    config = ModelConfig(
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        vocab_size=fields.integer("vocab_size"),
        num_key_value_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", 0),
        max_position_embeddings=fields.integer("max_position_embeddings", 2048),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_fields.number("rope_theta", 10000.0),
        rope_scaling=_rope_scaling(rope or fields.section("rope_scaling"), where),
        tie_word_embeddings=fields.truth("tie_word_embeddings", _IS_TIED_BY_DEFAULT[model_type]),
        initializer_range=fields.number("initializer_range", 0.02),
        bos_token_id=fields.token_id("bos_token_id", 1),
        eos_token_id=fields.token_ids("eos_token_id", (2,)),
        pad_token_id=fields.token_id("pad_token_id", None),
        torch_dtype=_dtype(values, where),
        model_type=model_type,
    )
    return _with_scales(config, fields)


def _with_scales(config: ModelConfig, fields: TypedFields) -> ModelConfig:
    root = math.sqrt(config.num_hidden_layers)
    if config.model_type == "llama":
        return config.replace(scale_emb=1.0, scale_depth=root, dim_model_base=float(config.hidden_size))
    if config.model_type == "minicpm":
        return config.replace(
            **{name: fields.number(name, 1.0) for name in ("scale_emb", "scale_depth", "dim_model_base")}
        )
    residual, divisor = fields.number("residual_multiplier", 1.0), fields.number("logits_scaling", 1.0)
    if not divisor:
        raise ConfigError(f"{fields.where}: logits_scaling must not be 0")
    attention = fields.number("attention_multiplier", 1.0)
    hidden = config.hidden_size
    is_usual = math.isclose(attention, config.head_dim**-0.5, rel_tol=1e-12)
    return config.replace(
        scale_emb=fields.number("embedding_multiplier", 1.0),
        # The file holds the quotient; the decimal that gives just this quotient is what was meant.
        scale_depth=shortest_decimal(residual * root, lambda depth: depth / root == residual),
        dim_model_base=shortest_decimal(hidden / divisor, lambda base: base > 0 and hidden / base == divisor),
        attention_multiplier=None if is_usual else attention,
    )


def _dtype(values: Mapping[str, Any], where: str) -> str:
    # transformers 5 writes "dtype".
    dtype = values.get("torch_dtype") or values.get("dtype") or "float32"
    if dtype not in DTYPES:
        raise ConfigError(f"{where}: torch_dtype {_brief(dtype)} is not supported; known: {', '.join(DTYPES)}")
    return str(dtype)


def _rope_scaling(values: Mapping[str, Any], where: str) -> RopeScaling | None:
    """Return the scaling in either spelling: {"type", …} of old, {"rope_type", …} of late."""
    kind = values.get("rope_type", values.get("type", "default"))
    if kind in ("default", None):
        return None
    fields = TypedFields(values, f"{where}: rope_scaling")
    original = fields.integer("original_max_position_embeddings", 0) or None
    try:
        if kind in ("linear", "dynamic"):
            return RopeScaling(kind, fields.number("factor"), original)
        if kind in ("llama3", "ntk_by_parts"):
            low, high = (1.0, 4.0) if kind == "llama3" else (1.0, 32.0)
            low, high = fields.number("low_freq_factor", low), fields.number("high_freq_factor", high)
            return RopeScaling(kind, fields.number("factor"), original, low, high)
        # Also refuses yarn, whose ramp and attention factor are other ones than those of ntk_by_parts.
        return RopeScaling(kind, 1.0)
    except ConfigError as error:
        raise ConfigError(str(error) if where in str(error) else f"{where}: {error}") from error


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` of `config`, in the spelling that old and new readers both understand.

    Raises:
        ConfigError: scales that the model type cannot express.
    """
    end = config.eos_token_id
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": end[0] if len(end) == 1 else list(end) or None,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.torch_dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.rope_scaling is not None:  # a null key makes transformers 5 warn
        values["rope_scaling"] = _rope_to_hf(config)
    if config.model_type != "minicpm" or config.head_dim * config.num_attention_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    if config.model_type == "llama":
        values["mlp_bias"] = False
    return values | _scales_to_hf(config)


def _scales_to_hf(config: ModelConfig) -> dict[str, float]:
    if config.model_type == "granite":
        return {
            "embedding_multiplier": config.scale_emb,
            "residual_multiplier": config.residual_scale,
            "attention_multiplier": config.attention_scale,
            "logits_scaling": config.logit_divisor,
        }
    if not math.isclose(config.attention_scale, config.head_dim**-0.5, rel_tol=1e-6):
        raise ConfigError(
            f"model type {config.model_type} has no attention_multiplier other than 1/√head_dim; write granite"
        )
    if config.model_type == "minicpm":
        return {
            "scale_emb": config.scale_emb,
            "scale_depth": config.scale_depth,
            "dim_model_base": config.dim_model_base,
        }
    if not all(
        math.isclose(s, 1.0, rel_tol=1e-6) for s in (config.scale_emb, config.residual_scale, config.logit_divisor)
    ):
        raise ConfigError("model type llama has no scales: fold them into the weights, or write granite or minicpm")
    return {}


def _rope_to_hf(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    # MiniCPM's own class accepts exactly the keys "type" and "factor" for these two.
    key = "type" if config.model_type == "minicpm" else "rope_type"
    values: dict[str, Any] = {key: scaling.rope_type, "factor": scaling.factor}
    if scaling.original_max_position_embeddings:
        values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.rope_type in ("llama3", "ntk_by_parts"):
        values |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    return values
