"""The three families that one graph serves, and how a model moves among them.

MiniCPM and Granite hold the same weights under other names for the scales; Llama has no scales, so they are folded into
the weights in float32 and rounded once, which also unties the head. A folded model carries a `FoldNote`, so that the
way back gives the original weights to the last bit wherever the folded ones were kept in float32.
What this leaves out: files.

Source: facts published with MiniCPM's llama-format releases (embedding × scale_emb, o_proj and down_proj ×
scale_depth/√L, head / (hidden/dim_model_base), untied).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from minicpm.architecture import MODEL_TYPES, ModelConfig
from minicpm.errors import ConfigError
from minicpm.exchange.recast import recast
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Entries = Mapping[str, WeightEntry]


@dataclass(frozen=True)
class FoldNote:
    """What a folded model was before: the scales, whether its head was tied, and the dtype of its weights."""

    model_type: str
    scale_emb: float
    scale_depth: float
    dim_model_base: float
    attention_multiplier: float | None
    tie_word_embeddings: bool
    torch_dtype: str

    @classmethod
    def of(cls, config: ModelConfig) -> FoldNote:
        """Return the note that undoes a fold of a model of `config`."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @classmethod
    def parse(cls, fields: Any) -> FoldNote | None:
        """Return the note in a config.json's `minicpm_fold`, None when there is none.

        Raises:
            ConfigError: a note that is not one.
        """
        if fields is None:
            return None
        try:
            return cls(**fields)
        except TypeError as error:
            raise ConfigError(f"minicpm_fold is not a fold note: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the note as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Move:
    """A model in its new family: configuration, weights (made on demand), and the note to be written, if any."""

    config: ModelConfig
    entries: Entries
    note: FoldNote | None


def move(config: ModelConfig, entries: Entries, family: str, note: FoldNote | None, block_type: str | None) -> Move:
    """Return the model in `family`.

    Args:
        config: of the source.
        entries: the source's weights; a tied head has none.
        family: minicpm, granite or llama.
        note: what the source's file remembers of an earlier fold.
        block_type: the float type that folded weights are rounded to; None keeps each weight's own.

    Raises:
        ConfigError: an unknown family, or scales that the family cannot express.
    """
    if family not in MODEL_TYPES:
        raise ConfigError(f"family {family!r} is not known; known: {', '.join(MODEL_TYPES)}")
    if family == config.model_type:
        return Move(config, entries, note)
    if family == "llama":
        return _fold(config, entries, block_type)
    if note is not None:
        config, entries = _unfold(config, entries, note, block_type)
    if family == "minicpm" and not math.isclose(config.attention_scale, config.head_dim**-0.5, rel_tol=1e-6):
        raise ConfigError(
            f"minicpm has no attention_multiplier; this model's {config.attention_scale:g} is not 1/√head_dim. "
            "Keep granite, or convert to llama, which folds it"
        )
    return Move(config.replace(model_type=family), entries, None)


def neutral(config: ModelConfig) -> ModelConfig:
    """Return `config` as a Llama: no scale does anything."""
    return config.replace(
        model_type="llama",
        scale_emb=1.0,
        scale_depth=math.sqrt(config.num_hidden_layers),
        dim_model_base=float(config.hidden_size),
        attention_multiplier=None,
    )


def fold_factors(config: ModelConfig) -> dict[str, float]:
    """Return what each kind of weight is multiplied by when the scales are folded in; the rest stay as they are."""
    return {
        EMBEDDING: config.scale_emb,
        HEAD: 1.0 / config.logit_divisor,
        "self_attn.o_proj.weight": config.residual_scale,
        "mlp.down_proj.weight": config.residual_scale,
        "self_attn.q_proj.weight": config.attention_scale * math.sqrt(config.head_dim),
    }


def _factor(name: str, factors: Mapping[str, float]) -> float:
    factor = next((value for suffix, value in factors.items() if name.endswith(suffix)), 1.0)
    # 1/√D · √D is not 1 to the last bit; a weight that needs no change must keep its bits.
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-12) else factor


def _scaled(name: str, entry: WeightEntry, factor: float, block_type: str | None) -> WeightEntry:
    target = block_type or entry.block_type
    if factor == 1.0:
        return entry

    def make(source: Callable[[], Weight] = entry.make) -> Weight:
        return recast(name, source(), target, factor)

    return WeightEntry(entry.shape, target, make)


def _fold(config: ModelConfig, entries: Entries, block_type: str | None) -> Move:
    factors = fold_factors(config)
    needs_head = not math.isclose(config.scale_emb * config.logit_divisor, 1.0, rel_tol=1e-12)
    source = dict(entries)
    if config.tie_word_embeddings and needs_head:
        source[HEAD] = source[EMBEDDING]
    folded = {name: _scaled(name, entry, _factor(name, factors), block_type) for name, entry in source.items()}
    return Move(
        neutral(config).replace(tie_word_embeddings=config.tie_word_embeddings and not needs_head),
        folded,
        FoldNote.of(config),
    )


def _unfold(
    config: ModelConfig, entries: Entries, note: FoldNote, block_type: str | None
) -> tuple[ModelConfig, dict[str, WeightEntry]]:
    fields = {name: value for name, value in note.to_dict().items() if name not in ("tie_word_embeddings",)}
    original = config.replace(**fields)
    block_type = block_type or _FLOATS.get(note.torch_dtype)
    factors = {suffix: 1.0 / factor for suffix, factor in fold_factors(original).items()}
    weights = {name: _scaled(name, entry, _factor(name, factors), block_type) for name, entry in entries.items()}
    if note.tie_word_embeddings and HEAD in weights and _are_equal(weights[HEAD].make(), weights[EMBEDDING].make()):
        del weights[HEAD]
        original = original.replace(tie_word_embeddings=True)
    return original, weights


def _are_equal(a: Weight, b: Weight) -> bool:
    return a.block_type == b.block_type and bool(np.array_equal(a.data, b.data))


_FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
