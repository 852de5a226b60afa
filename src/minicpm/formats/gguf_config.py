"""GGUF metadata <-> `ModelConfig`, for the architectures minicpm, llama and granite.

Files keep float32, configurations decimal numbers: each number read is the shortest decimal that the file's float32 is
the rounding of, so that a round trip returns 1.4 and not 1.39999998. What this leaves out: tensors, and every tokenizer
key but the ids that begin and end a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minicpm.architecture import MODEL_TYPES, ModelConfig, RopeScaling
from minicpm.errors import ConfigError, FormatError
from minicpm.formats.block_type import Floats
from minicpm.formats.decimals import shortest_decimal
from minicpm.formats.rope_factors import RAMPS, match_divisors

ARCHITECTURES = MODEL_TYPES
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def _rounds_to(stored: float, of: Callable[[float], float] = float) -> Callable[[float], bool]:
    def fits(candidate: float) -> bool:
        if not candidate:
            return False
        with np.errstate(over="ignore", under="ignore"):
            return bool(np.float32(of(candidate)) == np.float32(stored))

    return fits


class _Fields:
    """Typed look-ups of `ARCH.name`, each with an error that names the key."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str) -> None:
        self.metadata, self.architecture, self.where = metadata, architecture, where

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # some writers repeat the number for each layer
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise FormatError(f"{self.where}: {self.architecture}.{name} must be one whole number, got {brief(value)}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float):
            raise FormatError(f"{self.where}: {self.architecture}.{name} must be a number, got {brief(value)}")
        if type(value) is float and name in self:
            return shortest_decimal(value, _rounds_to(value))
        return float(value)

    def __contains__(self, name: str) -> bool:
        return f"{self.architecture}.{name}" in self.metadata

    def _get(self, name: str, default: Any) -> Any:
        key = f"{self.architecture}.{name}"
        if key not in self.metadata and default is None:
            raise FormatError(f"{self.where}: the metadata key {key} is missing")
        return self.metadata.get(key, default)


def brief(value: Any) -> str:
    """Return `value` as it may stand in a one-line message, whatever a file holds."""
    text = repr(value[:4])[:-1] + ", …]" if isinstance(value, list) and len(value) > 4 else repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def supported_architecture(metadata: Mapping[str, Any], where: str) -> str:
    """Return `general.architecture`.

    Raises:
        FormatError: missing or not supported.
    """
    found = metadata.get("general.architecture")
    if found not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise FormatError(f"{where}: architecture {brief(found)} is not supported; known: {known}")
    return str(found)


def config_from_gguf(
    metadata: Mapping[str, Any],
    *,
    vocab_size: int,
    is_tied: bool,
    rope_divisors: Floats | None = None,
    torch_dtype: str = "float16",
    where: str = "GGUF",
) -> ModelConfig:
    """Return the configuration that `metadata` describes.

    Args:
        metadata: the file's keys and values.
        vocab_size: rows of the embedding.
        is_tied: whether the file has no head of its own.
        rope_divisors: the tensor `rope_freqs.weight`, if there is one.
        torch_dtype: the dtype nearest to what the file holds.
        where: the file's name for messages.

    Raises:
        FormatError: unknown architecture, or a missing, mistyped or unsupported key.
    """
    architecture = supported_architecture(metadata, where)
    fields = _Fields(metadata, architecture, where)
    if architecture == "granite" and metadata.get("granite.rope.scaling.finetuned") is False:
        raise FormatError(f"{where}: granite.rope.scaling.finetuned is false: models without rope are not supported")
    if fields.integer("expert_count", 0):
        raise FormatError(f"{where}: {architecture}.expert_count > 0: mixtures of experts are not supported")
    hidden, layers, heads = (fields.integer(n) for n in ("embedding_length", "block_count", "attention.head_count"))
    head_dim = fields.integer("attention.key_length", hidden // max(heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(name, head_dim) != head_dim:
            raise FormatError(
                f"{where}: {architecture}.{name} must equal the head width {head_dim}, got {fields.integer(name)}"
            )
    try:
        config = ModelConfig(
            hidden_size=hidden,
            intermediate_size=fields.integer("feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=fields.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            vocab_size=vocab_size,
            max_position_embeddings=fields.integer("context_length"),
            rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
            rope_theta=fields.number("rope.freq_base", 10000.0),
            tie_word_embeddings=is_tied,
            torch_dtype=torch_dtype,
            model_type=architecture,
            **_scales(fields, hidden, layers, head_dim),
            **_token_ids(metadata, vocab_size, where),
        )
        return config.replace(rope_scaling=_rope_scaling(fields, config, rope_divisors))
    except ConfigError as error:
        raise FormatError(f"{where}: {error}") from error


def _scales(fields: _Fields, hidden: int, layers: int, head_dim: int) -> dict[str, Any]:
    """Return the three muP scales and the attention scale.

    Files of the first MiniCPM converter name no scales; they hold models with these of the 2B.
    """
    attention = fields.number("attention.scale", 0.0) or None
    if attention is not None and np.float32(attention) == np.float32(max(head_dim, 1) ** -0.5):
        attention = None  # what 0 and a missing key also stand for
    if fields.architecture == "llama":
        neutral = {"scale_emb": 1.0, "scale_depth": math.sqrt(max(layers, 1)), "dim_model_base": float(hidden)}
        return neutral | {"attention_multiplier": attention}
    is_minicpm = fields.architecture == "minicpm"
    root = math.sqrt(max(layers, 1))
    residual = fields.metadata.get(f"{fields.architecture}.residual_scale", 1.4 / root if is_minicpm else 1.0)
    divisor = fields.metadata.get(f"{fields.architecture}.logit_scale", hidden / 256 if is_minicpm else 1.0)
    if type(residual) not in (int, float) or type(divisor) not in (int, float) or not divisor:
        raise FormatError(
            f"{fields.where}: residual_scale {brief(residual)} or logit_scale {brief(divisor)} is no number or 0"
        )
    if attention is not None and is_minicpm:
        raise FormatError(f"{fields.where}: minicpm.attention.scale is not supported; granite has one")
    return {
        "scale_emb": fields.number("embedding_scale", 12.0 if is_minicpm else 1.0),
        "scale_depth": shortest_decimal(residual * root, _rounds_to(residual, lambda depth: depth / root)),
        "dim_model_base": shortest_decimal(hidden / divisor, _rounds_to(divisor, lambda base: hidden / base)),
        "attention_multiplier": attention,
    }


def _token_ids(metadata: Mapping[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    def token_id(name: str, default: int | None = None) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
            raise FormatError(f"{where}: tokenizer.ggml.{name} must be an id below {vocab_size}, got {brief(value)}")
        return value

    is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama" and vocab_size > 2
    ends = [token_id(name, 2 if is_sentencepiece and name == "eos_token_id" else None) for name in _EOS_KEYS]
    return {
        "bos_token_id": token_id("bos_token_id", 1 if is_sentencepiece else None),
        "eos_token_id": tuple(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": token_id("padding_token_id"),
    }


def _rope_scaling(fields: _Fields, config: ModelConfig, divisors: Floats | None) -> RopeScaling | None:
    kind = fields.metadata.get(f"{fields.architecture}.rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", 1.0) or 1.0  # converters write 0 for "not given"
    if "rope.scale_linear" in fields and kind == "none":
        kind, factor = "linear", fields.number("rope.scale_linear")
    if kind not in ("none", "linear", *RAMPS):
        raise FormatError(
            f"{fields.where}: rope scaling {brief(kind)} is not supported; known: none, linear, rope_freqs.weight"
        )
    if divisors is None:
        if kind in RAMPS:
            raise FormatError(f"{fields.where}: rope scaling {kind!r} without the tensor rope_freqs.weight")
        return RopeScaling("linear", factor) if kind == "linear" and factor != 1.0 else None
    if kind == "linear" and factor != 1.0:
        raise FormatError(f"{fields.where}: linear rope scaling together with rope_freqs.weight is not supported")
    return match_divisors(divisors, config, _described_scaling(fields), fields.where)


# Where our own writer keeps what rope_freqs.weight was made from; other readers ignore these keys.
_RAMP_KEY = "rope.ramp"


def _described_scaling(fields: _Fields) -> RopeScaling | None:
    kind = fields.metadata.get(f"{fields.architecture}.{_RAMP_KEY}.type")
    if not isinstance(kind, str):
        return None
    return RopeScaling(
        kind,
        fields.number(f"{_RAMP_KEY}.factor"),
        original_max_position_embeddings=fields.integer(f"{_RAMP_KEY}.original_context_length", 0) or None,
        low_freq_factor=fields.number(f"{_RAMP_KEY}.low_freq_factor"),
        high_freq_factor=fields.number(f"{_RAMP_KEY}.high_freq_factor"),
    )


def config_to_gguf(config: ModelConfig) -> dict[str, Any]:
    """Return the metadata that describes `config`: ints, floats and strings, without any tokenizer key but ids.

    The three scales are always written: llama.cpp's own default for a missing logit_scale is wrong for MiniCPM.

    Raises:
        ConfigError: the architecture's GGUF cannot express the configuration.
    """
    arch = config.model_type
    fields: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        fields |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    fields |= _scales_to_gguf(config) | _rope_to_gguf(config.rope_scaling)
    metadata = {"general.architecture": arch} | {f"{arch}.{name}": value for name, value in fields.items()}
    ids = {"bos_token_id": config.bos_token_id, "padding_token_id": config.pad_token_id}
    ids |= dict(zip(_EOS_KEYS, config.eos_token_id, strict=False))
    return metadata | {f"tokenizer.ggml.{name}": value for name, value in ids.items() if value is not None}


def _scales_to_gguf(config: ModelConfig) -> dict[str, Any]:
    usual = math.isclose(config.attention_scale, config.head_dim**-0.5, rel_tol=1e-6)
    if config.model_type == "llama":
        neutral = (config.scale_emb, config.residual_scale, config.logit_divisor)
        if not np.allclose(neutral, 1.0, rtol=1e-6):
            raise ConfigError("a llama GGUF has no scales: fold them into the weights, or write granite or minicpm")
        return {} if usual else {"attention.scale": config.attention_scale}
    if config.model_type == "minicpm" and not usual:
        raise ConfigError("a minicpm GGUF has no attention_multiplier other than 1/√head_dim; write granite instead")
    scales = {
        "embedding_scale": config.scale_emb,
        "residual_scale": config.residual_scale,
        "logit_scale": config.logit_divisor,
    }
    return scales if config.model_type == "minicpm" else scales | {"attention.scale": config.attention_scale}


def _rope_to_gguf(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    if scaling.rope_type == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if scaling.rope_type == "dynamic":
        raise ConfigError("GGUF cannot express dynamic rope scaling; use linear, ntk_by_parts or none")
    return {
        f"{_RAMP_KEY}.type": scaling.rope_type,
        f"{_RAMP_KEY}.factor": scaling.factor,
        f"{_RAMP_KEY}.original_context_length": scaling.original_max_position_embeddings or 0,
        f"{_RAMP_KEY}.low_freq_factor": scaling.low_freq_factor,
        f"{_RAMP_KEY}.high_freq_factor": scaling.high_freq_factor,
    }
