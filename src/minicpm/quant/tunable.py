"""Projections of which the half-precision numbers of every block are learned: scales and offsets; levels stay.

Every block type is linear in those numbers: a weight is the sum of each number times an integer that the rest of the
block says. So a tuned matrix has the type and the size that it had. What this leaves out: what is learned from
(`recovery.py`), and levels, which keep what rounding chose.

Source: learned step sizes as in LSQ (arXiv 1902.08153); scales tuned end to end as in EfficientQAT (arXiv 2407.11062).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm.errors import CheckpointError
from minicpm.formats import blocks
from minicpm.formats.weight import Weight

# Where in a block its half floats begin.
HALVES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,),
}  # fmt: skip
_ONE = np.frombuffer(np.float16(1).tobytes(), np.uint8)


class TunableLinear(nn.Module):
    """A projection without bias whose blocks' numbers are learned as factors of those of a weight.

    `change` (R, groups, numbers) is learned; blocks that share a scale share it too. The first change is of all numbers
    of a block together, which scales its weights and shifts none; a second moves the offset alone, which is about eight
    levels from the middle, by an eighth of it, so that one rate of learning serves both.
    """

    def __init__(self, weight: Weight, blocks_per_group: int = 1) -> None:
        """Take a weight (R, C) of a type in `HALVES`; so many neighbouring blocks have one scale."""
        super().__init__()
        self.source, self.blocks_per_group = weight, blocks_per_group
        parts = _parts(weight)
        offsets = HALVES[weight.block_type]
        halves = np.stack([parts[:, at : at + 2].copy().view("<f2")[:, 0] for at in offsets], axis=1)
        self.numbers = torch.from_numpy(halves.astype(np.float32)).view(weight.num_rows, -1, len(offsets))
        self.patterns = [_pattern(weight.block_type, parts, at).view(weight.num_rows, -1) for at in offsets]
        num_groups = self.numbers.shape[1] // blocks_per_group
        self.change = nn.Parameter(torch.zeros(weight.num_rows, num_groups, len(offsets)))

    def matrix(self, change: Tensor) -> Tensor:
        """Return the weight (R, C) in float32."""
        numbers = self._tuned(change)
        size = self.patterns[0].shape[1] // numbers.shape[1]
        result = torch.zeros(self.patterns[0].shape, dtype=numbers.dtype)
        for index, pattern in enumerate(self.patterns):
            grouped = pattern.view(*numbers.shape[:2], size)
            result.view(grouped.shape).addcmul_(grouped.to(numbers.dtype), numbers[:, :, index, None])
        return result

    def slope(self, matrix_slope: Tensor) -> Tensor:
        """Return the gradient of `change` for that of the weight (R, C)."""
        num_rows, num_blocks, _ = self.numbers.shape
        grouped = matrix_slope.view(num_rows, num_blocks, -1)
        parts = [(grouped * pattern.view(grouped.shape)).sum(-1) for pattern in self.patterns]
        slope = torch.stack(parts, dim=-1) * self.numbers @ self._mixture().T
        return slope.view(num_rows, -1, self.blocks_per_group, len(parts)).sum(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, R) for (…, C)."""
        result: Tensor = _Product.apply(x, self.change, self)  # type: ignore[no-untyped-call]  # torch gives `apply` no types
        return result

    def to_weight(self) -> Weight:
        """Return the tuned weight, of the type that it had.

        Raises:
            CheckpointError: a number beyond half precision.
        """
        numbers = self._tuned(self.change.detach()).half()
        if not numbers.isfinite().all():
            raise CheckpointError("recovery made scales that half precision cannot hold; take fewer steps")
        parts = _parts(self.source).copy()
        for index, at in enumerate(HALVES[self.source.block_type]):
            halves = numbers[:, :, index].reshape(-1, 1).contiguous().numpy().astype("<f2")
            parts[:, at : at + 2] = halves.view(np.uint8)
        return Weight(self.source.block_type, self.source.shape, parts.reshape(self.source.data.shape))

    def _tuned(self, change: Tensor) -> Tensor:
        return self.numbers * (1 + change.repeat_interleave(self.blocks_per_group, dim=1) @ self._mixture())

    def _mixture(self) -> Tensor:
        """Return what each change (row) does to each number's factor (column)."""
        mixture = torch.eye(len(self.patterns), dtype=self.numbers.dtype) / 8
        mixture[0] = 1
        return mixture


class _Product(torch.autograd.Function):
    """Keeps the input for the backward pass, and makes the weight anew there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor, module: TunableLinear) -> Tensor:
        ctx.save_for_backward(x, change)
        ctx.module = module
        return F.linear(x, module.matrix(change))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, change = ctx.saved_tensors
        module: TunableLinear = ctx.module
        flat = grad.reshape(-1, grad.shape[-1])
        return grad @ module.matrix(change), module.slope(flat.T @ x.reshape(-1, x.shape[-1])), None


def _parts(weight: Weight) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return weight.data.reshape(-1, blocks.block_type(weight.block_type).block_bytes)


def _pattern(kind: str, parts: np.ndarray[Any, np.dtype[np.uint8]], at: int) -> Tensor:
    """Return what the number at byte `at` is multiplied by in each weight: whole numbers, one byte where they fit."""
    bare = parts.copy()
    for other in HALVES[kind]:
        bare[:, other : other + 2] = _ONE if other == at else 0
    values = torch.from_numpy(blocks.decode(kind, bare))
    return values.to(torch.int8 if float(values.abs().max()) < 128 else torch.int16)
