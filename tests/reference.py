"""The truth that the engine is held to: the decoder of the three families as plain numpy on dequantized weights.

Written for exactness and reading, not speed: weights and products are float32, whatever is cheap is float64 (norms,
rotary angles, softmax, the sums of the residual stream). `ReferenceDecoder.step` has the meaning of the engine's
`Decoder.step`, so that it can stand in for it; `full_logits` runs one sequence without any cache.

Legend: N rows of a step, T positions, H query heads, K key/value heads, D head width, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from minicpm.architecture import ModelConfig

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


def random_weights(config: ModelConfig, seed: int = 0, *, std: float = 0.3) -> dict[str, Floats]:
    """Weights of `config` that make every factor matter: norms away from 1, logits with a spread of a few nats."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in config.weight_shapes().items():
        if len(shape) == 1:
            weights[name] = generator.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            # The embedding is multiplied by scale_emb and, tied, read by the head: it gets the smaller spread.
            scale = std / config.scale_emb**0.5 if "embed" in name else std * (96 / shape[1]) ** 0.5
            weights[name] = generator.normal(0, scale, shape).astype(np.float32)
    return weights


def log_softmax(logits: npt.NDArray[Any]) -> Doubles:
    """Log-probabilities of logits (…, V) in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(truth: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """KL(truth ‖ other) in nats between the distributions of two logit rows (V,)."""
    p, q = log_softmax(truth), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum())


class ReferenceDecoder:
    """A decoder that is right.

    `weights` maps HF names to arrays, or to anything with `decode() -> float32`. The keyword arguments are those of the
    engine's `Decoder`; `num_threads` and `kernel` mean nothing here. `num_positions` is the longest sequence, which
    only the `dynamic` rope scaling looks at.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        *,
        num_threads: int | None = None,
        num_blocks: int = 64,
        block_tokens: int = 32,
        kernel: str | None = None,
        num_positions: int = 0,
    ) -> None:
        self.config = config
        self.block_tokens = block_tokens
        self.weights = {name: np.asarray(_decoded(weight), np.float32) for name, weight in weights.items()}
        self.head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        self.frequencies = np.array(config.rope_frequencies(num_positions))
        size = (config.num_hidden_layers, num_blocks * block_tokens, config.num_key_value_heads, config.head_dim)
        # NaN: reading a position that was never written shows at once.
        self.keys = np.full(size, np.nan, np.float32)
        self.values = np.full(size, np.nan, np.float32)
        self.num_rows_computed = 0

    def step(
        self,
        tokens: Ints,
        positions: Ints,
        sequences: Ints,
        block_tables: Ints,
        output_rows: Ints,
        outputs: Literal["logits", "hidden"] = "logits",
    ) -> Floats:
        """Compute rows of several sequences and return logits (M, V), or final hidden states (M, E), of `output_rows`.

        Row n is token `tokens[n]` at `positions[n]` of sequence `sequences[n]`. The keys and values of position p go to
        slot p % block_tokens of block `block_tables[s][p // block_tokens]`; a row attends to positions 0 … p.
        """
        self.num_rows_computed += len(tokens)
        blocks = block_tables[sequences, positions // self.block_tokens]
        slots = blocks * self.block_tokens + positions % self.block_tokens

        def attend(layer: int, query: Floats, key: Floats, value: Floats) -> Floats:
            self.keys[layer, slots], self.values[layer, slots] = key, value
            mixed = np.empty_like(query)  # (N, H, D)
            for sequence in np.unique(sequences):
                rows = np.flatnonzero(sequences == sequence)
                seen = np.arange(positions[rows].max() + 1)
                at = block_tables[sequence, seen // self.block_tokens] * self.block_tokens + seen % self.block_tokens
                visible = seen[None, :] <= positions[rows, None]
                mixed[rows] = self._attention(query[rows], self.keys[layer, at], self.values[layer, at], visible)
            return mixed

        hidden = self._layers(tokens, positions, attend)[output_rows]
        return hidden if outputs == "hidden" else self._logits(hidden)

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a cache block into another."""
        begins = source * self.block_tokens, target * self.block_tokens
        for cache in (self.keys, self.values):
            old, new = (cache[:, begin : begin + self.block_tokens] for begin in begins)
            new[:] = old

    def full_logits(self, ids: Sequence[int], *, last_only: bool = False) -> Floats:
        """Logits (T, V) after each of `ids`, (1, V) after the last with `last_only`; nothing is cached."""
        hidden = self.full_hidden(ids)
        return self._logits(hidden[-1:] if last_only else hidden)

    def full_hidden(self, ids: Sequence[int]) -> Floats:
        """Final hidden states (T, E), after the last norm and before the head's divisor."""
        positions = np.arange(len(ids))
        visible = positions[None, :] <= positions[:, None]
        return self._layers(
            np.asarray(ids), positions, lambda _, query, key, value: self._attention(query, key, value, visible)
        )

    def _layers(self, tokens: Any, positions: Any, attend: Any) -> Floats:
        config, weights = self.config, self.weights
        scale = config.residual_scale
        state = weights["model.embed_tokens.weight"][tokens].astype(np.float64) * config.scale_emb  # (N, E)
        for layer in range(config.num_hidden_layers):
            at = f"model.layers.{layer}."
            normed = self._norm(state, at + "input_layernorm.weight")
            query, key, value = (
                (normed @ weights[f"{at}self_attn.{name}_proj.weight"].T).reshape(len(tokens), -1, config.head_dim)
                for name in "qkv"
            )
            mixed = attend(layer, self._rotate(query, positions), self._rotate(key, positions), value)
            state += scale * (mixed.reshape(len(tokens), -1) @ weights[at + "self_attn.o_proj.weight"].T)
            normed = self._norm(state, at + "post_attention_layernorm.weight")
            gate = normed @ weights[at + "mlp.gate_proj.weight"].T
            up = normed @ weights[at + "mlp.up_proj.weight"].T
            state += scale * ((_silu(gate) * up) @ weights[at + "mlp.down_proj.weight"].T)
        return self._norm(state, "model.norm.weight")

    def _norm(self, state: Doubles, name: str) -> Floats:
        variance = (state**2).mean(axis=-1, keepdims=True)
        normed = state / np.sqrt(variance + self.config.rms_norm_eps)
        return (normed * self.weights[name]).astype(np.float32)

    def _rotate(self, heads: Floats, positions: Any) -> Floats:
        angles = positions[:, None, None] * self.frequencies  # (N, 1, D/2)
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = np.split(heads, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(np.float32)

    def _attention(self, query: Floats, keys: Floats, values: Floats, visible: npt.NDArray[np.bool_]) -> Floats:
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        mixed = np.empty_like(query)  # (N, H, D)
        for head in range(self.config.num_attention_heads):
            scores = (query[:, head] @ keys[:, head // groups].T).astype(np.float64) * self.config.attention_scale
            scores[~visible] = -np.inf
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            shares /= shares.sum(axis=-1, keepdims=True)
            mixed[:, head] = shares.astype(np.float32) @ values[:, head // groups]
        return mixed

    def _logits(self, hidden: Floats) -> Floats:
        logits = (hidden / np.float32(self.config.logit_divisor)) @ self.head.T
        return logits.astype(np.float32)


def _silu(x: Floats) -> Floats:
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        return (wide / (1 + np.exp(-wide))).astype(np.float32)


def _decoded(weight: Any) -> Any:
    return weight.decode() if hasattr(weight, "decode") else weight
