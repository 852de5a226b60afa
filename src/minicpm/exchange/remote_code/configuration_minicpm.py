"""The configuration of MiniCPM models for transformers.

Written by the `minicpm` package (Apache-2.0). Runs with transformers 4.57 and 5.
"""

import math
from typing import ClassVar

from transformers import PretrainedConfig


class MiniCPMConfig(PretrainedConfig):
    """The numbers that define a MiniCPM decoder.

    `scale_depth` is the report's value before the division by the square root of the number of layers;
    `rope_theta` 10000 and a tied head are what published files mean when they say nothing.
    """

    model_type = "minicpm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        head_dim=None,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=True,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        rope_scaling=None,
        attention_multiplier=None,
        scale_emb=1.0,
        dim_model_base=1.0,
        scale_depth=1.0,
        **kwargs,
    ):
        # One dictionary in place of rope_theta and rope_scaling, as transformers 5 saves them.
        rope = kwargs.pop("rope_parameters", None) or rope_scaling or {}
        if hidden_act != "silu" or kwargs.get("num_experts") or kwargs.get("attention_bias"):
            raise ValueError("this code runs dense MiniCPM models with hidden_act silu and without biases only")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.rope_parameters = _rope_parameters(rope, float(rope_theta))
        self.attention_multiplier = attention_multiplier
        self.scale_emb, self.scale_depth, self.dim_model_base = scale_emb, scale_depth, dim_model_base
        ids = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **ids, **kwargs)

    def rope_frequencies(self, num_positions):
        """Return head_dim/2 rotary frequencies; only `dynamic` scaling looks at the number of positions."""
        scaling = self.rope_parameters
        kind, factor = scaling["rope_type"], scaling.get("factor", 1.0)
        trained = scaling.get("original_max_position_embeddings") or self.max_position_embeddings
        base, dim = scaling["rope_theta"], self.head_dim
        if kind == "dynamic" and num_positions > trained:
            base *= (factor * num_positions / trained - (factor - 1)) ** (dim / (dim - 2))
        plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
        if kind == "linear":
            return [f / factor for f in plain]
        if kind in ("ntk_by_parts", "llama3"):
            low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 32.0)
            kept = [min(1.0, max(0.0, (trained * f / (2 * math.pi) - low) / (high - low))) for f in plain]
            return [share * f + (1 - share) * f / factor for share, f in zip(kept, plain, strict=True)]
        return plain


def _rope_parameters(rope, theta):
    """Return `rope` with its `rope_type` and `rope_theta`; older files call the type `type`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "dynamic", "ntk_by_parts", "llama3"):
        raise ValueError(f"rope scaling {kind!r} is not supported; known: linear, dynamic, ntk_by_parts, llama3")
    rest = {key: value for key, value in rope.items() if key != "type"}
    return {"rope_theta": theta, **rest, "rope_type": kind}
