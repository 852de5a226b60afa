"""The configuration of the original training code ("dragonfly") -> `ModelConfig`.

Source: OpenBMB/MiniCPM `convert_hf_to_vllmcpm.py` and the configuration class of the training code's public release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.errors import ConfigError
from minicpm.formats.typed_fields import TypedFields

_DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def is_dragonfly(values: Mapping[str, Any]) -> bool:
    """Whether a parsed `config.json` is in the original training code's language."""
    return "model_type" not in values and "dim_model" in values


def config_from_dragonfly(
    values: Mapping[str, Any], *, vocab_size: int, has_head: bool, where: str = "config.json"
) -> ModelConfig:
    """Return the configuration in `values`.

    Args:
        values: the parsed JSON object.
        vocab_size: rows of the embedding, which the file may leave out.
        has_head: whether the weights include a head, which decides where the file does not.
        where: the file's name for messages.

    Raises:
        ConfigError: a missing or mistyped key, or a feature that is not supported.
    """
    fields = TypedFields(values, where)
    if fields.truth("qk_norm", False):
        raise ConfigError(f"{where}: qk_norm true is not supported: queries and keys are not normalised")
    if fields.integer("num_experts", 0):
        raise ConfigError(f"{where}: num_experts > 0: mixtures of experts are not supported")
    if values.get("activate_fn", "silu") != "silu":
        raise ConfigError(f"{where}: activate_fn {str(values['activate_fn'])[:40]!r} is not supported; known: silu")
    hidden, heads = fields.integer("dim_model"), fields.integer("num_heads")
    base = fields.number("dim_model_base", hidden) if fields.truth("scale", True) else float(hidden)
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=fields.integer("dim_ff"),
        num_hidden_layers=fields.integer("num_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_kv_heads", heads),
        head_dim=fields.integer("dim_head", 0),
        vocab_size=fields.integer("vocab_size", vocab_size),
        max_position_embeddings=fields.integer("max_length", fields.integer("orig_max_length", 4096)),
        rms_norm_eps=fields.number("eps", 1e-5),
        rope_theta=fields.number("base", 10000.0),
        rope_scaling=_rope_scaling(fields, where),
        tie_word_embeddings=fields.truth("tie_lm_head", not has_head),
        scale_emb=fields.number("scale_emb", 1.0),
        scale_depth=fields.number("scale_depth", 1.0),
        dim_model_base=base,
        initializer_range=fields.number("init_std", 0.1),
        torch_dtype=_DTYPES.get(str(values.get("dtype", "bf16")), "bfloat16"),
        model_type="minicpm",
    )


def _rope_scaling(fields: TypedFields, where: str) -> RopeScaling | None:
    kind = str(fields.values.get("rope_scaling_type") or "").lower()
    if not kind:
        return None
    if kind not in ("linear", "dynamic"):
        raise ConfigError(f"{where}: rope_scaling_type {kind[:40]!r} is not supported; known: linear, dynamic")
    factor = fields.number("rope_scaling_factor", 1.0)
    original = fields.integer("orig_max_length", 0) or None
    return RopeScaling(kind, factor, original) if factor != 1.0 else None
