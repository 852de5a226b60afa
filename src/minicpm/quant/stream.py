"""Hidden states through a model that is never whole in memory: one layer's weights at a time, in float32.

A decoder layer is run in four stages, between which its matrices may change: each stage gives the inputs of the
matrices that come next. What this leaves out: what is done with those inputs (`layer.py`, `judge.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm.architecture import ModelConfig
from minicpm.formats.folder_weights import EMBEDDING, HEAD
from minicpm.formats.mapped_file import release
from minicpm.formats.weight import Weight
from minicpm.model.attention import Attention, document_mask, document_starts
from minicpm.model.layers import DecoderLayer, RMSNorm
from minicpm.model.loading import fill, read_tensor
from minicpm.model.rope import rotation_table
from minicpm.quant.windows import Windows

Weights = Mapping[str, Weight]
# Tokens that go through a layer at once.
_PIECE_TOKENS = 2048
# Logits that are made at once: 256 MiB of float32.
_PIECE_LOGITS = 1 << 26


class Context:
    """What attention needs of packed windows: masks and rotations."""

    def __init__(self, config: ModelConfig, windows: Windows) -> None:
        self.starts = document_starts(windows.document_ids)
        positions = torch.arange(windows.ids.shape[1]) - self.starts
        self.rotation = rotation_table(config.rope_frequencies(windows.ids.shape[1]), positions)
        self.step = max(1, _PIECE_TOKENS // windows.ids.shape[1])

    def pieces(self) -> Iterator[slice]:
        """Yield ranges of windows that go through a layer together."""
        for start in range(0, len(self.starts), self.step):
            yield slice(start, start + self.step)

    def attend(self, attention: nn.Module, x: Tensor, piece: slice) -> Tensor:
        """Return the attention of normed states `x` (b, T, E) of the windows in `piece`."""
        cos, sin = self.rotation
        out: Tensor = attention(x, (cos[piece], sin[piece]), document_mask(self.starts[piece]))
        return out


def layer_names(config: ModelConfig, index: int) -> dict[str, str]:
    """Return the HF names of a layer's weights: name in the layer -> name in the model."""
    at = f"model.layers.{index}."
    return {name.removeprefix(at): name for name in config.weight_shapes() if name.startswith(at)}


def load_layer(config: ModelConfig, weights: Weights, index: int) -> DecoderLayer:
    """Return layer `index` in float32."""
    with torch.device("meta"):
        layer = DecoderLayer(config, index)
    layer = layer.float().to_empty(device="cpu").requires_grad_(False)
    for short, name in layer_names(config, index).items():
        fill(layer.get_parameter(short), weights[name])
    return layer


def embed(config: ModelConfig, weights: Weights, windows: Windows) -> Tensor:
    """Return the scaled embeddings (B, T, E); only the rows that occur are decoded."""
    known, places = torch.unique(windows.ids, return_inverse=True)
    weight = weights[EMBEDDING]
    rows = weight.take_rows(known.numpy()).decode()
    release(weight.data)
    return F.embedding(places, torch.from_numpy(rows)) * config.scale_emb


def run_layer(layer: DecoderLayer, hidden: Tensor, context: Context) -> None:
    """Take `hidden` (B, T, E) through a layer, in place."""
    for piece in context.pieces():
        h = hidden[piece]
        h = h + context.attend(layer.self_attn, layer.input_layernorm(h), piece) * layer.residual_scale
        hidden[piece] = h + layer.mlp(layer.post_attention_layernorm(h)) * layer.residual_scale


def final_states(config: ModelConfig, weights: Weights, hidden: Tensor) -> Tensor:
    """Return what the head multiplies, (B, T, E), of the last layer's output."""
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight = nn.Parameter(read_tensor(weights["model.norm.weight"]).float(), requires_grad=False)
    normed: Tensor = norm(hidden) / config.logit_divisor
    return normed


def head_matrix(config: ModelConfig, weights: Weights) -> Tensor:
    """Return the output matrix (V, E) in float32."""
    weight = weights[EMBEDDING if config.tie_word_embeddings else HEAD]
    matrix = torch.empty(weight.shape)
    fill(matrix, weight)
    return matrix


def logit_pieces(states: Tensor, matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield ranges of the states (N, E) and their logits (n, V)."""
    step = max(1, _PIECE_LOGITS // len(matrix))
    for start in range(0, len(states), step):
        yield slice(start, start + step), states[start : start + step] @ matrix.T


def mix(context: Context, attention: Attention, normed: Tensor) -> Tensor:
    """Return what the output projection of `attention` multiplies, (B, T, heads · D), for normed states (B, T, E)."""
    output = attention._modules["o_proj"]
    attention._modules["o_proj"] = nn.Identity()
    try:
        return through_pieces(context, normed, lambda x, piece: context.attend(attention, x, piece))
    finally:
        attention._modules["o_proj"] = output


def through_pieces(context: Context, hidden: Tensor, make: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Return what `make` gives for every piece of `hidden`, joined along the windows."""
    return torch.cat([make(hidden[piece], piece) for piece in context.pieces()])
