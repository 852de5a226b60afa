"""Rotary position embedding in the rotate-half layout of HF checkpoints, in float32 throughout.

What this leaves out: the frequencies themselves and their scaling, which the engine shares
(`ModelConfig.rope_frequencies`), and the interleaved layout of GGUF files, which `formats` undoes.

Source: RoFormer (arXiv 2104.09864) §3.4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation_table(frequencies: tuple[float, ...], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of every position, float32, each (B or 1, 1, T, D/2).

    The frequencies come as numbers and not as a buffer: `model.to(torch.bfloat16)` would round a buffer, and beyond
    position 256 a rounded angle is visibly wrong.

    Args:
        frequencies: D/2 numbers in radians per position.
        positions: integers, (B or 1, T).
    """
    rates = torch.tensor(frequencies, dtype=torch.float32, device=positions.device)
    angles = positions[:, None, :, None].to(torch.float32) * rates  # (B, 1, T, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` (B, heads, T, D) turned by its positions' angles; computed in float32, returned in `x`'s dtype."""
    left, right = x.to(torch.float32).chunk(2, dim=-1)  # (B, heads, T, D/2) each
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)
