"""One decoder layer onto grids: four stages, each with the inputs that the matrices rounded before it give.

What this leaves out: the order of layers and what is kept of them (`model.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm.errors import CheckpointError
from minicpm.formats import blocks
from minicpm.formats.weight import Weight
from minicpm.model.layers import DecoderLayer
from minicpm.quant.grid import GRIDS
from minicpm.quant.rounding import damped, descend, feed_back, inverse_factor, relative_error, round_nearest
from minicpm.quant.stream import Context, mix, through_pieces

Method = Literal["nearest", "search", "gptq"]
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FEED_FORWARD_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
PROJECTIONS = (*ATTENTION_INPUTS, "self_attn.o_proj", *FEED_FORWARD_INPUTS, "mlp.down_proj")

# Of a second moment, made together.
_MOMENT_COLUMNS = 512


@dataclass(frozen=True)
class RoundingSettings:
    """How a matrix is rounded.

    Attributes:
        method: `nearest` sees no text; `search` weighs errors by the inputs' squares; `gptq` feeds errors back.
        damping: the share of the Hessian's mean diagonal that is added to it.
        shrinkage: the share of the inputs' correlations that is not believed; see `damped`.
        sweeps: how often descent goes through a matrix after error feedback.
    """

    method: Method = "gptq"
    damping: float = 0.01
    shrinkage: float = 0.2
    sweeps: int = 2

    def inverse_factor(self, name: str, hessian: Tensor) -> Tensor:
        """Return what `feed_back` needs of a Hessian (C, C)."""
        return inverse_factor(name, hessian, self.damping, self.shrinkage)


@dataclass(frozen=True)
class RoundedMatrix:
    """A rounded weight and the mean squared error of its outputs over their mean square."""

    weight: Weight
    error: float


def second_moment(inputs: Tensor) -> Tensor:
    """Return XᵀX/n (C, C) of inputs (…, C); it is symmetric, so that little more than half of it is multiplied."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    num_columns = flat.shape[1]
    result = torch.empty(num_columns, num_columns)
    for start in range(0, num_columns, _MOMENT_COLUMNS):
        rows = slice(start, start + _MOMENT_COLUMNS)
        result[rows, start:] = flat[:, rows].T @ flat[:, start:] / len(flat)
        result[start:, rows] = result[rows, start:].T.clone()
    return result


def round_matrix(
    name: str, matrix: Tensor, hessian: Tensor, block_type: str, settings: RoundingSettings, upper: Tensor | None = None
) -> RoundedMatrix:
    """Return `matrix` (R, C) in `block_type`.

    Args:
        name: for messages.
        matrix: float32.
        hessian: of its inputs, (C, C).
        block_type: a key of `GRIDS`, or a float type.
        settings: how.
        upper: what `settings.inverse_factor` gives for `hessian`, where it is known.

    Raises:
        CheckpointError: a Hessian or a weight that is not finite.
    """
    if not matrix.isfinite().all():
        raise CheckpointError(f"{name} holds NaN or infinity; such a model cannot be quantized")
    if block_type not in GRIDS or (settings.method == "nearest" and block_type in blocks.BLOCK_TYPES):
        weight = Weight(block_type, tuple(matrix.shape), blocks.encode(block_type, matrix.numpy()))
    elif settings.method == "nearest":
        weight = round_nearest(matrix, block_type, torch.ones(matrix.shape[1])).to_weight()
    elif settings.method == "search":
        weight = round_nearest(matrix, block_type, damped(hessian, settings.damping).diagonal()).to_weight()
    else:
        upper = settings.inverse_factor(name, hessian) if upper is None else upper
        rounded = feed_back(matrix, block_type, upper)
        descend(matrix, damped(hessian, settings.damping, settings.shrinkage), rounded, settings.sweeps)
        weight = rounded.to_weight()
    decoded = torch.from_numpy(weight.decode())
    if not decoded.isfinite().all():
        raise CheckpointError(
            f"{name} holds weights that {block_type} cannot hold; scale the model or take a GGUF type"
        )
    return RoundedMatrix(weight, relative_error(matrix, decoded, hessian))


class LayerRounding:
    """Rounds the matrices of one layer as its inputs pass through it."""

    def __init__(
        self, name: str, layer: DecoderLayer, block_types: Mapping[str, str], settings: RoundingSettings
    ) -> None:
        """Prepare.

        Args:
            name: of the layer, for messages.
            layer: float32; its matrices are replaced by rounded ones.
            block_types: a type for each of `PROJECTIONS`.
            settings: how.
        """
        self.name, self.layer, self.block_types, self.settings = name, layer, block_types, settings
        self.done: dict[str, RoundedMatrix] = {}

    def run(self, hidden: Tensor, context: Context) -> None:
        """Round everything and take `hidden` (B, T, E) through the rounded layer, in place."""
        layer, scale = self.layer, self.layer.residual_scale
        attention, mlp = layer.self_attn, layer.mlp
        normed: Tensor = layer.input_layernorm(hidden)
        self._round(ATTENTION_INPUTS, normed)
        mixed = mix(context, attention, normed)
        self._round(("self_attn.o_proj",), mixed)
        hidden += attention.o_proj(mixed) * scale
        del mixed
        normed = layer.post_attention_layernorm(hidden)
        self._round(FEED_FORWARD_INPUTS, normed)
        inner = through_pieces(context, normed, lambda x, piece: F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
        self._round(("mlp.down_proj",), inner)
        hidden += mlp.down_proj(inner) * scale

    def _round(self, names: tuple[str, ...], inputs: Tensor) -> None:
        hessian = second_moment(inputs)
        upper = None
        if self.settings.method == "gptq":
            upper = self.settings.inverse_factor(f"{self.name}.{names[0]}", hessian)
        for name in names:
            linear = self.layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            result = round_matrix(
                f"{self.name}.{name}", linear.weight, hessian, self.block_types[name], self.settings, upper
            )
            linear.weight = nn.Parameter(torch.from_numpy(result.weight.decode()), requires_grad=False)
            self.done[name] = result
