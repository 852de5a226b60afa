"""The shape of a model: `ModelConfig`, presets, derived sizes, and counts of parameters and bytes.

One decoder graph serves three families that differ only in scales: MiniCPM, Llama (scale_emb 1, scale_depth √L,
dim_model_base = hidden_size) and Granite. Field names are those of the HF `config.json`. What this leaves out:
weights, files, and any computation on tensors.

Source: MiniCPM technical report (arXiv 2404.06395) tables 2, 7, 8; OpenBMB/MiniCPM `configuration_minicpm.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicpm.errors import ConfigError

MODEL_TYPES = ("minicpm", "llama", "granite")
ROPE_TYPES = ("linear", "dynamic", "ntk_by_parts", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `linear` divides every frequency by `factor`; `dynamic` raises the base once the sequence is longer than the
    trained context; `ntk_by_parts` interpolates only the long wavelengths, between the rotation counts
    `low_freq_factor` and `high_freq_factor` (YaRN §3.2 calls them α and β); `llama3` is the ramp of Llama 3.1.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 32.0

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(f"rope_scaling type {self.rope_type!r} is not supported; known: {', '.join(ROPE_TYPES)}")
        if not self.factor >= 1.0:
            raise ConfigError(f"rope_scaling factor must be at least 1, got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError("rope_scaling needs 0 < low_freq_factor < high_freq_factor")


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that define a decoder; names as in the HF config.json.

    `head_dim` and `num_key_value_heads` default to what HF derives. `scale_depth` is the report's value before the
    division by √L. `attention_multiplier` is the factor on q·k; None means 1/√head_dim.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    scale_emb: float = 1.0
    scale_depth: float = 1.0
    dim_model_base: float = 0.0
    attention_multiplier: float | None = None
    initializer_range: float = 0.1
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int | None = None
    torch_dtype: str = "bfloat16"
    model_type: str = "minicpm"

    def __post_init__(self) -> None:
        fill = object.__setattr__
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.num_key_value_heads:
            fill(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}; "
                    "give head_dim"
                )
            fill(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if not self.dim_model_base:
            fill(self, "dim_model_base", float(self.hidden_size))
        self._check()

    def _check(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ConfigError(f"model_type {self.model_type!r} is not supported; known: {', '.join(MODEL_TYPES)}")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, got {self.head_dim}")
        if self.max_position_embeddings < 1:
            raise ConfigError(f"max_position_embeddings must be at least 1, got {self.max_position_embeddings}")
        for name in ("rms_norm_eps", "rope_theta", "scale_emb", "scale_depth", "dim_model_base"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, got {value}")

    @property
    def residual_scale(self) -> float:
        """The factor on both branches of a layer, scale_depth/√num_hidden_layers (report table 7)."""
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logit_divisor(self) -> float:
        """What the final hidden state is divided by before the head, hidden_size/dim_model_base (report table 7)."""
        return self.hidden_size / self.dim_model_base

    @property
    def attention_scale(self) -> float:
        """The factor on q·k before the softmax."""
        return self.attention_multiplier if self.attention_multiplier is not None else self.head_dim**-0.5

    @property
    def query_size(self) -> int:
        """Width of the query projection, heads × head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of one of the key and value projections, kv heads × head_dim."""
        return self.num_key_value_heads * self.head_dim

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every parameter's HF name and shape, in the order of the forward pass; a tied head has no entry."""
        hidden, inter, query, kv = self.hidden_size, self.intermediate_size, self.query_size, self.kv_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_hidden_layers):
            at = f"model.layers.{layer}."
            shapes[at + "input_layernorm.weight"] = (hidden,)
            shapes[at + "self_attn.q_proj.weight"] = (query, hidden)
            shapes[at + "self_attn.k_proj.weight"] = (kv, hidden)
            shapes[at + "self_attn.v_proj.weight"] = (kv, hidden)
            shapes[at + "self_attn.o_proj.weight"] = (hidden, query)
            shapes[at + "post_attention_layernorm.weight"] = (hidden,)
            shapes[at + "mlp.gate_proj.weight"] = (inter, hidden)
            shapes[at + "mlp.up_proj.weight"] = (inter, hidden)
            shapes[at + "mlp.down_proj.weight"] = (hidden, inter)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def num_parameters(self) -> ParameterCounts:
        """Return the parameter counts by kind."""
        hidden, inter = self.hidden_size, self.intermediate_size
        per_layer = hidden * (2 * self.query_size + 2 * self.kv_size) + 3 * hidden * inter
        embedding = self.vocab_size * hidden
        return ParameterCounts(
            linear=self.num_hidden_layers * per_layer,
            norms=(2 * self.num_hidden_layers + 1) * hidden,
            embedding=embedding,
            head=0 if self.tie_word_embeddings else embedding,
        )

    def kv_cache_bytes(self, num_tokens: int = 1, bytes_per_value: float = 2) -> int:
        """Return the bytes of keys and values of `num_tokens` positions over all layers."""
        return int(num_tokens * 2 * self.num_hidden_layers * self.kv_size * bytes_per_value)

    def rope_frequencies(self, num_positions: int = 0) -> tuple[float, ...]:
        """Return the head_dim/2 rotary frequencies in radians per position, fastest first, stretched by `rope_scaling`.

        Only `dynamic` looks at `num_positions`, the longest sequence that the frequencies must serve: the base rises
        once that exceeds the trained context. What fixes a cache's length passes that length, so that early keys and
        late queries turn alike.

        Source: RoFormer §3.4.2; YaRN (arXiv 2309.00071) §3.2, definition 2; Llama 3.1's `apply_scaling`.
        """
        scaling, base = self.rope_scaling, self.rope_theta
        trained = (scaling and scaling.original_max_position_embeddings) or self.max_position_embeddings
        if scaling and scaling.rope_type == "dynamic" and num_positions > trained:
            growth = scaling.factor * num_positions / trained - (scaling.factor - 1)
            base *= growth ** (self.head_dim / (self.head_dim - 2))
        plain = tuple(base ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2))
        if scaling is None or scaling.rope_type == "dynamic":
            return plain
        if scaling.rope_type == "linear":
            return tuple(f / scaling.factor for f in plain)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = (min(1.0, max(0.0, (trained * f / (2 * math.pi) - low) / (high - low))) for f in plain)
        return tuple(share * f + (1 - share) * f / scaling.factor for share, f in zip(kept, plain, strict=True))

    def replace(self, **changes: Any) -> ModelConfig:
        """Return a copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model has, by kind; a tied head counts as 0."""

    linear: int
    norms: int
    embedding: int
    head: int

    @property
    def non_embedding(self) -> int:
        """Linear layers and norms: the N of scaling laws."""
        return self.linear + self.norms

    @property
    def total(self) -> int:
        """All stored parameters."""
        return self.non_embedding + self.embedding + self.head


def _minicpm(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        scale_emb=12.0,
        scale_depth=1.4,
        dim_model_base=256.0,
    )


PRESETS: Mapping[str, ModelConfig] = {
    "minicpm-2b": _minicpm(2304, 5760, 40, 36, 36, 122753),
    "minicpm-1b": _minicpm(1536, 3840, 52, 24, 8, 73440),
    # The report's wind-tunnel models (table 8), here with the 2B's vocabulary.
    "wind-9m": _minicpm(320, 800, 8, 5, 5, 122753),
    "wind-30m": _minicpm(512, 1280, 12, 8, 8, 122753),
    "wind-70m": _minicpm(640, 1600, 14, 10, 10, 122753),
    "wind-0.1b": _minicpm(768, 1920, 16, 12, 12, 122753),
    "wind-0.17b": _minicpm(896, 2240, 18, 14, 14, 122753),
    "wind-0.2b": _minicpm(1024, 2560, 20, 16, 16, 122753),
    "wind-0.5b": _minicpm(1344, 3360, 24, 21, 21, 122753),
}
