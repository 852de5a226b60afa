"""The scale of a group of weights, searched: trial scales give levels, and the least-squares scale of those is judged.

Groups stand in columns, float32 (width, n), so that every sum runs over the slow axis; `importance` (width, n or 1)
weighs the squared errors. What this leaves out: how precisely a block type can hold a scale (`grid.py`).

Source: the weighted searches of ggml `ggml-quants.c` (which trials); the fit is written from scratch.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How far a trial stretches the largest weight beyond (or short of) the outermost level, in levels.
_STRETCHES = tuple(0.25 * step for step in range(-8, 9))
_SPANS = tuple(0.3 * step for step in range(-5, 10))
_REFINEMENTS = 3


def reciprocal(values: Tensor) -> Tensor:
    """Return 1/values, and 0 where that is not finite."""
    result = values.reciprocal()
    return torch.where(result.isfinite(), result, 0.0)


def fit_symmetric(values: Tensor, importance: Tensor, lowest: int, highest: int) -> Tensor:
    """Return the scale (n,) of the best `scale · level` with levels `lowest`..`highest`; its sign is free."""
    peak = values.gather(0, values.abs().argmax(0, keepdim=True))[0]
    weighted = importance * values
    inverse_peak = reciprocal(peak)
    best_gain, best_scale = torch.zeros_like(peak), torch.zeros_like(peak)

    def consider(inverse_scale: Tensor) -> None:
        nonlocal best_gain, best_scale
        levels = (values * inverse_scale).round_().clamp_(lowest, highest)
        sum_xl = (weighted * levels).sum(0)
        scale = sum_xl * reciprocal((importance * levels.square_()).sum(0))
        gain = scale * sum_xl
        is_better = gain > best_gain
        best_gain = torch.where(is_better, gain, best_gain)
        best_scale = torch.where(is_better, scale, best_scale)

    for stretch in _STRETCHES:
        consider((lowest - stretch) * inverse_peak)
        if lowest != -highest:
            consider((highest + stretch) * inverse_peak)
    for _ in range(_REFINEMENTS):
        consider(reciprocal(best_scale))
    return best_scale


def fit_affine(values: Tensor, importance: Tensor, top: int, *, is_bounded: bool) -> tuple[Tensor, Tensor]:
    """Return scale and offset, (n,) each, of the best `scale · level + offset` with levels 0..top.

    Args:
        values: float32 (width, n).
        importance: of each squared error, (width, n or 1).
        top: the highest level.
        is_bounded: whether the offset may not be positive, as in super-blocks.
    """
    low = values.amin(0)
    low = low.clamp(max=0.0) if is_bounded else low
    shifted = values - low
    width = shifted.amax(0)
    weighted = importance * shifted
    sum_w = importance.sum(0).expand_as(low)
    sum_x, sum_xx = weighted.sum(0), (weighted * shifted).sum(0)
    best_scale, best_offset = width / top, torch.zeros_like(low)
    best_error = torch.full_like(low, torch.inf)

    def consider(scaled: Tensor) -> None:
        nonlocal best_scale, best_offset, best_error
        levels = scaled.round_().clamp_(0, top)
        weighted_levels = importance * levels
        sum_xl = (weighted * levels).sum(0)
        sum_l, sum_ll = weighted_levels.sum(0), (weighted_levels * levels).sum(0)
        determinant = sum_w * sum_ll - sum_l * sum_l
        inverse_determinant = reciprocal(determinant)
        scale = (sum_w * sum_xl - sum_x * sum_l) * inverse_determinant
        offset = (sum_ll * sum_x - sum_l * sum_xl) * inverse_determinant
        if is_bounded:
            is_over = offset + low > 0
            offset = torch.where(is_over, -low, offset)
            scale = torch.where(is_over, (sum_xl - offset * sum_l) * reciprocal(sum_ll), scale)
        error = sum_xx - 2 * (scale * sum_xl + offset * sum_x)
        error += scale * scale * sum_ll + 2 * scale * offset * sum_l + offset * offset * sum_w
        is_better = (error < best_error) & (scale > 0) & (determinant > 0)
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_offset = torch.where(is_better, offset, best_offset)

    inverse_width = reciprocal(width)
    for span in _SPANS:
        consider(shifted * ((top + span) * inverse_width))
    for _ in range(_REFINEMENTS):
        consider((shifted - best_offset) * reciprocal(best_scale))
    return best_scale, best_offset + low
