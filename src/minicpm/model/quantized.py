"""Frozen projections whose weight stays in 4-bit blocks and is decoded for the moment of a product.

The blocks are those of GGUF files: a file is trained on as it will be served. What this leaves out: choosing levels by
a model's inputs, and trained weights (adapters stand beside: `lora`).

Source: QLoRA (arXiv 2305.14314) §3: adapters on a base that is stored in 4 bits and multiplied in 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm.architecture import ModelConfig
from minicpm.errors import FormatError
from minicpm.formats import blocks
from minicpm.formats.mapped_file import release
from minicpm.formats.weight import Weight
from minicpm.model.loading import FLOAT_TYPES, check_names_and_shapes, fill, without_equal_head
from minicpm.model.lora import PROJECTIONS
from minicpm.model.minicpm import MiniCPM

# Values that are encoded or decoded at a time.
_PIECE = 1 << 20
# Bytes of float16 before a block's levels, of the types that are decoded where they lie.
_HEADS = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}


class Workspace:
    """Room for one decoded matrix, which all products of a model take in turn.

    A matrix of its own for every product would be freed and leave a hole; the layer's result, which stays, would be put
    into that hole, and the next matrix would be too large for it.
    """

    def __init__(self, most_values: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.values = torch.empty(most_values, dtype=dtype, device=device)


class QuantizedLinear(nn.Module):
    """A frozen projection without bias; `blocks` is uint8 (out_features, row bytes) of `block_type`."""

    def __init__(self, data: Tensor, block_type: str, in_features: int, workspace: Workspace) -> None:
        super().__init__()
        self.out_features, self.in_features = data.shape[0], in_features
        self.block_type, self.workspace = block_type, workspace
        self.blocks: Tensor
        self.register_buffer("blocks", data, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The decoded matrix (out_features, in_features), made anew by every look."""
        return decode(self.blocks, self.block_type, self.workspace.values.dtype)

    def borrow_weight(self) -> Tensor:
        """Return the decoded matrix in the workspace, where it lasts until the next product of the model."""
        room = self.workspace.values[: self.out_features * self.in_features]
        return decode_into(room.view(self.out_features, self.in_features), self.blocks, self.block_type)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out_features) for (…, in_features)."""
        result: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]  # torch gives `apply` no types
        return result


class _Product(torch.autograd.Function):
    """Keeps nothing for the backward pass: neither the input (the weight is frozen) nor the decoded weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.borrow_weight())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.module.borrow_weight(), None


def decode(data: Tensor, block_type: str, dtype: torch.dtype) -> Tensor:
    """Return the values of uint8 blocks (rows, row bytes) in `dtype`, rounded once from what float32 gives."""
    kind = blocks.block_type(block_type)
    columns = data.shape[1] // kind.block_bytes * kind.block_size
    return decode_into(torch.empty(data.shape[0], columns, dtype=dtype, device=data.device), data, block_type)


def decode_into(found: Tensor, data: Tensor, block_type: str) -> Tensor:
    """Write the values of uint8 blocks into `found` (rows, columns) and return it; a few rows are float32 at a time.

    The commonest types are decoded where the blocks lie; others by way of the CPU.
    """
    step = max(_PIECE // found.shape[1], 1)
    for start in range(0, len(found), step):
        found[start : start + step] = _values(data[start : start + step], block_type)
    return found


def _values(data: Tensor, block_type: str) -> Tensor:
    """Return the float32 values (rows, columns) of blocks."""
    head = _HEADS.get(block_type)
    if head is None:
        return torch.from_numpy(blocks.decode(block_type, data.cpu().numpy())).to(data.device)
    rows = data.shape[0]
    parts = data.view(rows, -1, blocks.block_type(block_type).block_bytes)  # (rows, blocks, bytes)
    scales = parts[..., :head].contiguous().view(torch.float16).float()  # (rows, blocks, 1 or 2)
    levels = parts[..., head:]
    if block_type == "Q8_0":
        values = levels.view(torch.int8) * scales
    else:
        levels = torch.cat((levels & 15, levels >> 4), dim=-1)
        if block_type == "Q4_0":
            values = (levels.view(torch.int8) - 8) * scales
        else:
            values = levels * scales[..., :1] + scales[..., 1:]
    return values.reshape(rows, -1)


def load_quantized(
    config: ModelConfig,
    weights: Mapping[str, Weight],
    block_type: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> MiniCPM:
    """Return a frozen model whose projections are blocks and whose other weights have `dtype`.

    Blocks of the source are kept as they are; floats are rounded to `block_type`, a few million values at a time.

    Raises:
        CheckpointError: weights that do not fit the config.
        FormatError: a row that is no whole number of blocks.
    """
    weights = without_equal_head(config, weights)
    check_names_and_shapes(config, weights)
    with torch.device("meta"):
        model = MiniCPM(config)
    sizes = [weight.numel() for name, weight in model.named_parameters() if name.split(".")[-2] in PROJECTIONS]
    workspace = Workspace(max(sizes), dtype, device)
    for name, _ in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] in PROJECTIONS:
            weight = weights[f"{name}.weight"]
            kind = block_type if weight.block_type in FLOAT_TYPES else weight.block_type
            data = torch.from_numpy(_encoded(weight, kind)).to(device)
            model.set_submodule(name, QuantizedLinear(data, kind, weight.shape[-1], workspace))
            release(weight.data)
    for name, parameter in list(model.named_parameters()):
        filled = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False)
        fill(filled, weights[name])
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, filled)
    return model


def _encoded(weight: Weight, block_type: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the blocks in memory of their own."""
    if weight.block_type == block_type:
        return np.array(weight.data)
    kind = blocks.block_type(block_type)
    if weight.shape[-1] % kind.block_size:
        raise FormatError(f"rows of {weight.shape[-1]} weights are no whole number of {block_type} blocks; use Q8_0 …")
    found = np.empty((weight.num_rows, kind.row_bytes(weight.shape[-1])), np.uint8)
    step = max(_PIECE // weight.shape[-1], 1)
    for start in range(0, weight.num_rows, step):
        found[start : start + step] = blocks.encode(block_type, weight.decode_rows(start, start + step))
    return found
