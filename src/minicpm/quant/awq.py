"""AWQ: inputs that carry much are scaled up in the weights and down before them, where the scale costs nothing.

The division goes into what makes the inputs: a norm's weight, the rows of the value projection, those of the up
projection. The network stays the same function; rounding then hurts the salient inputs less. What this leaves out:
rounding itself, and the clipping of outliers, which the search of scales does.

Source: AWQ (arXiv 2306.00978) §3.2, eq. 4 and 5; the places of folding are those of AutoAWQ for Llama.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm.model.attention import Attention
from minicpm.model.layers import DecoderLayer
from minicpm.quant.grid import GRIDS, Grid
from minicpm.quant.layer import ATTENTION_INPUTS, FEED_FORWARD_INPUTS, second_moment
from minicpm.quant.scale_search import reciprocal
from minicpm.quant.stream import Context, mix, through_pieces

_EXPONENTS = tuple(step / 10 for step in range(11))


def fold_layer(layer: DecoderLayer, hidden: Tensor, context: Context, block_types: Mapping[str, str]) -> None:
    """Scale a float32 layer's inputs for rounding to `block_types`; what it computes of `hidden` (B, T, E) stays."""
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, Attention)
    normed: Tensor = layer.input_layernorm(hidden)
    scale = choose_scale(
        [layer.get_submodule(name) for name in ATTENTION_INPUTS], normed, block_types["self_attn.q_proj"]
    )
    mixed, output = mix(context, attention, normed), attention.o_proj
    _fold(layer, ATTENTION_INPUTS, layer.input_layernorm.weight, scale)
    h = hidden + output(mixed) * layer.residual_scale
    if not attention.is_grouped:  # a value row that several heads read can have one scale only
        scale = choose_scale([output], mixed, block_types["self_attn.o_proj"])
        _fold(layer, ("self_attn.o_proj",), attention.v_proj.weight, scale)
    del mixed
    normed = layer.post_attention_layernorm(h)
    scale = choose_scale(
        [layer.get_submodule(name) for name in FEED_FORWARD_INPUTS], normed, block_types["mlp.up_proj"]
    )
    inner = through_pieces(context, normed, lambda x, piece: F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    _fold(layer, FEED_FORWARD_INPUTS, layer.post_attention_layernorm.weight, scale)
    scale = choose_scale([mlp.down_proj], inner, block_types["mlp.down_proj"])
    _fold(layer, ("mlp.down_proj",), mlp.up_proj.weight, scale)


def choose_scale(linears: Sequence[nn.Module], inputs: Tensor, block_type: str) -> Tensor:
    """Return the scale (C,) of the inputs (…, C) with which rounding changes the outputs of `linears` least."""
    hessian = second_moment(inputs)
    size = inputs.reshape(-1, inputs.shape[-1]).abs().mean(0).clamp(min=1e-4)
    matrices = [linear.weight for linear in linears]
    best, best_error = torch.ones_like(size), torch.inf
    for exponent in _EXPONENTS:
        scale = size.pow(exponent)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for matrix in matrices:
            assert isinstance(matrix, Tensor)
            difference = matrix - quick_round(matrix * scale, GRIDS[block_type]) / scale
            error += float((difference @ hessian * difference).sum())
        if error < best_error:
            best, best_error = scale, error
    return best


def quick_round(matrix: Tensor, grid: Grid) -> Tensor:
    """Return `matrix` (R, C) on the nearest levels of a grid whose scales span each group and are not rounded."""
    groups = matrix.reshape(-1, grid.width)
    if grid.zero is None:
        low = groups.amin(1, keepdim=True)
        scale = (groups.amax(1, keepdim=True) - low) / grid.top
        return (((groups - low) * reciprocal(scale)).round() * scale + low).view_as(matrix)
    peak = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scale = peak / (grid.lowest - grid.zero)
    levels = (groups * reciprocal(scale)).round().clamp(grid.lowest - grid.zero, grid.top - grid.zero)
    return (levels * scale).view_as(matrix)


def _fold(layer: DecoderLayer, names: Sequence[str], before: Tensor, scale: Tensor) -> None:
    """Multiply the columns of the matrices called `names` by `scale`, and divide what makes their inputs."""
    for name in names:
        layer.get_parameter(f"{name}.weight").mul_(scale)
    before.div_(scale if before.dim() == 1 else scale[:, None])
