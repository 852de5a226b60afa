"""One matrix onto a grid: nearest levels under searched scales, GPTQ's error feedback, and descent on both.

The objective is tr(D H Dᵀ) with D what rounding changes and H = XᵀX/n over the inputs of calibration. Error feedback
rounds column by column and moves each column's error into the columns not yet rounded; descent then goes through the
groups again: the scale that is best for the levels, and for each column the level that is best given all others.
What this leaves out: where H comes from (`hessian.py`).

Source: GPTQ (arXiv 2210.17323) §3, algorithm 1; cyclic descent as in QuantEase (arXiv 2309.01885) §3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minicpm.errors import CheckpointError
from minicpm.formats.weight import Weight
from minicpm.quant.grid import GRIDS, Grid
from minicpm.quant.scale_search import reciprocal

_CHUNK = 32
_DAMPING_TRIES = 4


@dataclass
class Rounded:
    """A matrix (rows R, columns C) on a grid, inputs first.

    Attributes:
        grid: where its weights lie.
        levels: float32 (C, R).
        scale: (groups, R).
        offset: (groups, R).
        codes: (groups, 2, R), how the block type says scale and offset.
        units: (blocks, 2 or 0, R).
    """

    grid: Grid
    levels: Tensor
    scale: Tensor
    offset: Tensor
    codes: Tensor
    units: Tensor

    @classmethod
    def empty(cls, grid: Grid, num_columns: int, num_rows: int) -> Rounded:
        """Return room for a matrix."""
        groups, blocks = num_columns // grid.width, num_columns // grid.block_size
        return cls(
            grid,
            torch.empty(num_columns, num_rows),
            torch.empty(groups, num_rows),
            torch.empty(groups, num_rows),
            torch.empty(groups, 2, num_rows),
            torch.empty(blocks, 2 if grid.code_range else 0, num_rows),
        )

    def columns(self, start: int, stop: int) -> Tensor:
        """Return the weights of columns `start` up to `stop`, (stop - start, R); both are at borders of groups."""
        width = self.grid.width
        first, last = start // width, stop // width
        grouped = self.levels[start:stop].view(last - first, width, -1)
        return (grouped * self.scale[first:last, None] + self.offset[first:last, None]).view(stop - start, -1)

    def set_group(self, group: int, scale: Tensor, offset: Tensor) -> None:
        """Let a group have the nearest scale and offset that its block type holds."""
        units = self.units[group * self.grid.width // self.grid.block_size]
        self.scale[group], self.offset[group], self.codes[group] = self.grid.snap(scale, offset, units)

    def fit_group(self, group: int, values: Tensor, importance: Tensor) -> None:
        """Fit a group's scale to `values` (columns from the group's first on, R); a super-block's units first."""
        width, size = self.grid.width, self.grid.block_size
        if self.grid.code_range is not None and group * width % size == 0:
            self.units[group * width // size] = self.grid.units(values[:size], importance[:size])
        self.set_group(group, *self.grid.fit(values[:width], importance[:width]))

    def to_weight(self) -> Weight:
        """Return it as it is stored."""
        shape = (self.levels.shape[1], self.levels.shape[0])
        return Weight(self.grid.block_type, shape, self.grid.pack(self.levels.to(torch.uint8), self.codes, self.units))


def round_nearest(weight: Tensor, block_type: str, importance: Tensor) -> Rounded:
    """Return `weight` (R, C) on the nearest levels under scales searched for errors that weigh `importance` (C,)."""
    values, grid = weight.T.contiguous(), GRIDS[block_type]
    rounded = Rounded.empty(grid, *values.shape)
    weights = importance[:, None]
    for group in range(len(values) // grid.width):
        start = group * grid.width
        rounded.fit_group(group, values[start:], weights[start:])
        part = values[start : start + grid.width]
        rounded.levels[start : start + grid.width] = grid.levels(part, rounded.scale[group], rounded.offset[group])
    return rounded


def feed_back(weight: Tensor, block_type: str, upper: Tensor) -> Rounded:
    """Return `weight` (R, C) rounded by GPTQ, whose scales are chosen group by group as the weights then stand.

    Args:
        weight: float32.
        block_type: a key of `GRIDS` whose blocks fill a row.
        upper: from `inverse_factor`.
    """
    rest, grid = weight.T.contiguous().clone(), GRIDS[block_type]
    num_columns, num_rows = rest.shape
    rounded = Rounded.empty(grid, num_columns, num_rows)
    diagonal = upper.diagonal()
    importance = diagonal.square().reciprocal()[:, None]
    errors = torch.empty(_CHUNK, num_rows)
    for start in range(0, num_columns, _CHUNK):
        stop = start + _CHUNK
        for column in range(start, stop):
            group = column // grid.width
            if column % grid.width == 0:
                rounded.fit_group(group, rest[column:], importance[column:])
            scale, offset = rounded.scale[group], rounded.offset[group]
            levels = grid.levels(rest[column], scale, offset)
            rounded.levels[column] = levels
            error = (rest[column] - levels * scale - offset) / diagonal[column]
            rest[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return rounded


def descend(weight: Tensor, hessian: Tensor, rounded: Rounded, sweeps: int) -> None:
    """Lower the objective of `rounded` in place: `sweeps` times through all groups, scales first, then levels."""
    grid, width = rounded.grid, rounded.grid.width
    num_columns = len(hessian)
    gradient = hessian @ (weight.T - rounded.columns(0, num_columns))  # (C, R)
    diagonal = hessian.diagonal()
    for _ in range(sweeps):
        for group in range(num_columns // width):
            start, stop = group * width, (group + 1) * width
            before = rounded.columns(start, stop)
            block = hessian[start:stop, start:stop]
            local = gradient[start:stop].clone()
            _refit_scale(rounded, group, block, local)
            scale = rounded.scale[group]
            levels = rounded.levels[start:stop]
            step = reciprocal(scale)
            for index in range(width):
                wanted = levels[index] + local[index] * (step / diagonal[start + index])
                new = wanted.round_().clamp_(grid.lowest, grid.top)
                local.addr_(block[:, index], (new - levels[index]) * scale, alpha=-1)
                levels[index] = new
            gradient.addmm_(hessian[:, start:stop], rounded.columns(start, stop) - before, alpha=-1)


def _refit_scale(rounded: Rounded, group: int, block: Tensor, local: Tensor) -> None:
    """Move a group to its best scale and offset for its levels, in rows where that helps; `local` follows."""
    grid, width = rounded.grid, rounded.grid.width
    levels = rounded.levels[group * width : (group + 1) * width]
    scale, offset = rounded.scale[group], rounded.offset[group]
    zero = rounded.codes[group, 1] if grid.has_whole_zero else grid.zero
    if zero is not None:
        basis = levels - zero
        new = scale + (basis * local).sum(0) * reciprocal((basis * (block @ basis)).sum(0))
        wanted = new, new * -zero
    else:
        product, ones = block @ levels, block.sum(1, keepdim=True)
        ll, lo, oo = (levels * product).sum(0), (levels * ones).sum(0), ones.sum()
        gl, go = (levels * local).sum(0), local.sum(0)
        inverse = reciprocal(ll * oo - lo * lo)
        wanted = scale + (gl * oo - go * lo) * inverse, offset + (go * ll - gl * lo) * inverse
    units = rounded.units[group * width // grid.block_size]
    new_scale, new_offset, codes = grid.snap(*wanted, units)
    moved = levels * (new_scale - scale) + (new_offset - offset)
    gain = (moved * (2 * local - block @ moved)).sum(0)
    is_better = gain > 0
    rounded.scale[group] = torch.where(is_better, new_scale, scale)
    rounded.offset[group] = torch.where(is_better, new_offset, offset)
    rounded.codes[group] = torch.where(is_better, codes, rounded.codes[group])
    local -= block @ torch.where(is_better, moved, 0.0)


def damped(hessian: Tensor, share: float, shrinkage: float = 0.0) -> Tensor:
    """Return `hessian` as rounding should trust it.

    Correlations of inputs are estimated from little text and differ from text to text, mean squares much less: so the
    former shrink by `shrinkage` (at 1 only the latter are left, and error feedback ends as a search of scales).

    Args:
        hessian: XᵀX/n.
        share: of the mean diagonal, added to the diagonal.
        shrinkage: what correlations lose, from 0 to 1.

    Source: shrinkage towards the diagonal, Schäfer & Strimmer 2005 (doi 10.2202/1544-6115.1175), target D.
    """
    result = hessian * (1 - shrinkage)
    mean = float(hessian.diagonal().mean())
    result.diagonal().copy_(hessian.diagonal() + (share * mean if mean > 0 else 1.0))
    return result


def inverse_factor(name: str, hessian: Tensor, share: float, shrinkage: float = 0.0) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse, (C, C).

    Args:
        name: for messages.
        hessian: XᵀX/n, not damped.
        share: damping; ten times more is tried where rounding left the matrix indefinite.
        shrinkage: see `damped`.

    Raises:
        CheckpointError: a Hessian that is not finite, or stays indefinite.
    """
    if not hessian.isfinite().all():
        raise CheckpointError(
            f"{name}: the Hessian of its inputs is not finite: activations overflow on the calibration text; "
            "the weights are broken, or the text is not the model's"
        )
    for attempt in range(_DAMPING_TRIES):
        lower, status = torch.linalg.cholesky_ex(damped(hessian, share * 10**attempt, shrinkage))
        if int(status) == 0:
            upper, status = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(status) == 0:
                factor: Tensor = upper
                return factor
    raise CheckpointError(f"{name}: the Hessian of its inputs cannot be factored; give more calibration text")


def relative_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return the mean squared error of the outputs over their mean square; both matrices are (R, C)."""
    difference = weight - rounded
    lost = (difference @ hessian * difference).sum(dtype=torch.float64)
    kept = (weight @ hessian * weight).sum(dtype=torch.float64)
    return float(lost / kept) if float(kept) > 0 else 0.0
