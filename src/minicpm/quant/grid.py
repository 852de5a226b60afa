"""Block types as grids that calibrated rounding can choose from: scales fitted, rounded to what a block holds, packed.

A weight is `scale · level + offset`. Weights stand in columns of the model's inputs first, float32 (columns, rows): a
group of `width` input columns has one scale for every row. What this leaves out: which level a weight takes.

Source: ggml `ggml-common.h` (layouts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from minicpm.errors import CheckpointError
from minicpm.formats import k_blocks, simple_blocks
from minicpm.formats.block_type import Bytes
from minicpm.formats.blocks import BLOCK_TYPES
from minicpm.quant.scale_search import fit_affine, fit_symmetric, reciprocal


@dataclass(frozen=True, slots=True)
class Grid:
    """The levels and scales of one block type.

    Attributes:
        block_type: what its weights are kept in.
        width: weights that share a scale; several blocks may repeat one.
        lowest: the lowest level that is used.
        top: the highest one.
        zero: the level of the weight 0 where the offset follows from the scale; None where it is free.
        code_range: the integers that say a group's scale in units of its super-block; None where it is a half float.
        has_whole_zero: whether the offset is a whole number of scales, from 0 to `top`, whose negative it is.
    """

    block_type: str
    width: int
    lowest: int
    top: int
    zero: int | None
    code_range: tuple[int, int] | None = None
    has_whole_zero: bool = False

    @property
    def block_size(self) -> int:
        """Weights of one block."""
        return BLOCK_TYPES[self.block_type].block_size

    def fit(self, values: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best scale and offset, (n,) each, for groups (width, n) whose errors weigh `importance`."""
        if self.has_whole_zero:
            return self._fit_whole_zero(values, importance)
        if self.zero is None:
            return fit_affine(values, importance, self.top, is_bounded=self.code_range is not None)
        scale = fit_symmetric(values, importance, self.lowest - self.zero, self.top - self.zero)
        return scale, scale * -self.zero

    def units(self, values: Tensor, importance: Tensor) -> Tensor:
        """Return the units (2, n) of scale and offset for whole blocks (block_size, n); (0, n) where there are none.

        Raises:
            CheckpointError: weights beyond what a half float can scale.
        """
        num = values.shape[1]
        if self.code_range is None:
            return values.new_empty(0, num)
        groups = values.view(-1, self.width, num).transpose(0, 1).reshape(self.width, -1)
        weights = importance.expand_as(values).reshape(-1, self.width, num).transpose(0, 1).reshape(self.width, -1)
        scale, offset = (part.view(-1, num) for part in self.fit(groups, weights))
        least, most = self.code_range
        if least < 0:
            largest = scale.gather(0, scale.abs().argmax(0, keepdim=True))[0]
            return torch.stack([self._half(largest / least), torch.zeros_like(largest)])
        return torch.stack([self._half(scale.amax(0) / most), self._half(-offset.amin(0) / most)])

    def snap(self, scale: Tensor, offset: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nearest scale and offset that the block type holds, and their codes (2, n).

        Raises:
            CheckpointError: a scale beyond half precision.
        """
        if self.has_whole_zero:
            # A zero beyond the top would cut the lowest weights off; a wider scale keeps them.
            scale = self._half(torch.maximum(scale, -offset / self.top))
            zero = (-offset * reciprocal(scale)).round().clamp(0, self.top)
            return scale, scale * -zero, torch.stack([scale, zero])
        if self.code_range is None:
            scale = self._half(scale)
            offset = self._half(offset) if self.zero is None else scale * -self.zero
            return scale, offset, torch.stack([scale, offset])
        codes = (scale * reciprocal(units[0])).round().clamp(*self.code_range)
        scale = units[0] * codes
        if self.zero is not None:
            return scale, scale * -self.zero, torch.stack([codes, torch.zeros_like(codes)])
        minima = (-offset * reciprocal(units[1])).round().clamp(*self.code_range)
        return scale, units[1] * -minima, torch.stack([codes, minima])

    def levels(self, values: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """Return the nearest levels of `values`, as floats."""
        return ((values - offset) * reciprocal(scale)).round_().clamp_(self.lowest, self.top)

    def pack(self, levels: Tensor, codes: Tensor, units: Tensor) -> Bytes:
        """Return a weight's bytes, uint8 (rows, row_bytes).

        Args:
            levels: uint8 (columns, rows).
            codes: (groups, 2, rows), from `snap`.
            units: (blocks, 2 or 0, rows), from `units`.
        """
        num_columns, num_rows = levels.shape
        flat = levels.T.contiguous().numpy().reshape(-1, self.block_size)
        numbers = codes.permute(2, 0, 1).contiguous().numpy()  # (rows, groups, 2)
        if self.has_whole_zero:
            zeros = numbers[:, :, 1].reshape(-1, 1).astype(np.uint8)
            flat = (flat.reshape(-1, self.width) + (np.uint8(_SIGNED_ZERO) - zeros)).reshape(flat.shape)
        if self.width > self.block_size:
            numbers = numbers.repeat(self.width // self.block_size, axis=1)
        packed = _LAYOUTS[self.block_type](flat, numbers.reshape(len(flat), -1, 2), _unit_bytes(units, len(flat)))
        return packed.reshape(num_rows, BLOCK_TYPES[self.block_type].row_bytes(num_columns))

    def _fit_whole_zero(self, values: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale that is best for the levels around the zero that a free offset comes nearest to."""
        scale, offset = fit_affine(values, importance, self.top, is_bounded=True)
        scale, offset, codes = self.snap(scale, offset, values)
        basis = self.levels(values, scale, offset) - codes[1]
        scale = (importance * values * basis).sum(0) * reciprocal((importance * basis * basis).sum(0))
        return scale, scale * -codes[1]

    def _half(self, values: Tensor) -> Tensor:
        half = values.half().float()
        if not half.isfinite().all():
            raise CheckpointError(
                f"weights that are NaN, infinite or need a scale beyond 65504 cannot be stored as {self.block_type}"
            )
        return half


def _unit_bytes(units: Tensor, num_blocks: int) -> Bytes:
    if units.shape[1] == 0:
        return np.empty((num_blocks, 0), np.uint8)
    return units.permute(2, 0, 1).half().contiguous().numpy().astype("<f2").reshape(num_blocks, 2).view(np.uint8)


def _halves(numbers: np.ndarray, count: int) -> Bytes:
    return np.ascontiguousarray(numbers[:, 0, :count]).astype("<f2").view(np.uint8)


def _six_bits(numbers: np.ndarray) -> Bytes:
    codes = numbers.astype(np.uint8)
    return k_blocks.pack_six_bits(codes[:, :, 0], codes[:, :, 1])


def _fifth(levels: Bytes, numbers: np.ndarray, count: int) -> Bytes:
    head = _halves(numbers, count)
    return np.concatenate([head, simple_blocks.fifth_bits(levels), simple_blocks.join_nibbles(levels)], axis=1)


def _pack_q8_0(levels: Bytes, numbers: np.ndarray, units: Bytes) -> Bytes:
    # The level 128 stands for 0: flipping the top bit makes a signed byte of it.
    return np.concatenate([_halves(numbers, 1), levels ^ np.uint8(128)], axis=1)


def _pack_q6_k(levels: Bytes, numbers: np.ndarray, units: Bytes) -> Bytes:
    codes = numbers[:, :, 0].astype(np.int8).view(np.uint8)
    return np.concatenate([k_blocks.join_six_bits(levels), codes, units[:, :2]], axis=1)


def folder_type(method: str, group_size: int) -> str:
    """Return the name of the grid that a GPTQ or AWQ folder holds: its weights are kept in blocks until it is written.

    GPTQ's zero is the middle level, as its fastest readers want it; AWQ's is free.
    """
    return f"{method.upper()}-{group_size}"


def blocks_per_group(types: Mapping[str, str]) -> dict[str, int]:
    """Return how many neighbouring blocks have one scale, for every matrix that has a grid."""
    grids = {name: GRIDS[kind] for name, kind in types.items() if kind in GRIDS}
    return {name: max(1, grid.width // grid.block_size) for name, grid in grids.items()}


_LAYOUTS = {
    "Q4_0": lambda levels, n, u: np.concatenate([_halves(n, 1), simple_blocks.join_nibbles(levels)], axis=1),
    "Q4_1": lambda levels, n, u: np.concatenate([_halves(n, 2), simple_blocks.join_nibbles(levels)], axis=1),
    "Q5_0": lambda levels, n, u: _fifth(levels, n, 1),
    "Q5_1": lambda levels, n, u: _fifth(levels, n, 2),
    "Q8_0": _pack_q8_0,
    "Q4_K": lambda levels, n, u: np.concatenate([u, _six_bits(n), k_blocks.join_nibbles(levels)], axis=1),
    "Q5_K": lambda levels, n, u: np.concatenate(
        [u, _six_bits(n), k_blocks.fifth_bits(levels), k_blocks.join_nibbles(levels)], axis=1
    ),
    "Q6_K": _pack_q6_k,
}

_SIX = (0, 63)
# Of Q5_0, which keeps what a level and a zero of 4 bits differ by.
_SIGNED_ZERO = 16
# Inputs that share a scale in folders for transformers and vLLM.
GROUP_SIZES = (128, 64, 32)
GRIDS: Mapping[str, Grid] = MappingProxyType(
    {
        grid.block_type: grid
        for grid in (
            Grid("Q4_0", 32, 0, 15, 8),
            Grid("Q4_1", 32, 0, 15, None),
            Grid("Q5_0", 32, 0, 31, 16),
            Grid("Q5_1", 32, 0, 31, None),
            Grid("Q8_0", 32, 1, 255, 128),
            Grid("Q4_K", 32, 0, 15, None, _SIX),
            Grid("Q5_K", 32, 0, 31, None, _SIX),
            Grid("Q6_K", 16, 0, 63, 32, (-128, 127)),
        )
    }
    | {folder_type("gptq", width): Grid("Q4_0", width, 0, 15, 8) for width in GROUP_SIZES}
    | {folder_type("awq", width): Grid("Q5_0", width, 0, 15, None, None, True) for width in GROUP_SIZES}
)
