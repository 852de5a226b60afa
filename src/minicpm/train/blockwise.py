"""Adam's two moments in 8 bits: one code a value, one float32 scale a block of 256.

The codes are not evenly spaced: half of a block's values are a thousand times smaller than its largest, and a linear
code would call them zero. What this leaves out: the update itself (`optim`).

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861) §2.2: blocks, and codes whose
relative error is about even over many orders of magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
# Decades below a block's largest value that have codes of their own: squares span twice as many as what they square.
_SIGNED_DECADES, _UNSIGNED_DECADES = 5, 8


def code_values(is_signed: bool) -> Tensor:
    """Return the 256 values in [-1, 1] or [0, 1] that the codes stand for, rising, evenly spaced in the logarithm.

    0 is among them, and 1 is the last.
    """
    count, decades = (127, _SIGNED_DECADES) if is_signed else (255, _UNSIGNED_DECADES)
    positive = torch.logspace(-decades, 0, count, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    if not is_signed:
        return torch.cat((zero, positive)).float()
    # One code is left over: 0 twice does no harm and keeps the table symmetric.
    return torch.cat((-positive.flip(0), zero, zero, positive)).float()


@dataclass(frozen=True)
class Codebook:
    """A table of values and the borders between them."""

    values: Tensor
    borders: Tensor

    @classmethod
    def build(cls, is_signed: bool, device: torch.device) -> Codebook:
        """Return the table for `device`; the borders are the midpoints, in float32.

        An unsigned value above 0 never becomes 0: a mean divided by the root of a vanished square would be enormous.
        """
        values = code_values(is_signed).to(device)
        borders = (values[1:] + values[:-1]) / 2
        if not is_signed:
            borders[0] = 0.0
        return cls(values, borders)

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return (uint8 codes of `values`' size, float32 scale of every block) for a flat float32 tensor."""
        blocks = _as_blocks(values)  # (blocks, BLOCK)
        scales = blocks.abs().amax(dim=1)
        normal = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(normal, self.borders).to(torch.uint8)
        return codes.reshape(-1)[: values.numel()], scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the flat float32 values."""
        values = _as_blocks(self.values[codes.to(torch.int32)])
        return (values * scales[:, None]).reshape(-1)[: codes.numel()]


def _as_blocks(flat: Tensor) -> Tensor:
    missing = -flat.numel() % BLOCK
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(-1, BLOCK)
