"""Blocks whose numbers are learned: the same values and bytes before the first step, and true gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minicpm.errors import CheckpointError
from minicpm.formats.weight import Weight
from minicpm.quant.tunable import HALVES, TunableLinear

ROWS, COLUMNS = 6, 512


def rounded(kind: str) -> Weight:
    values = np.random.default_rng(3).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return Weight.from_array(values, kind)


@pytest.mark.parametrize("kind", sorted(HALVES))
def test_nothing_changes_before_it_is_tuned(kind: str) -> None:
    weight = rounded(kind)
    layer = TunableLinear(weight)
    torch.testing.assert_close(layer.matrix(layer.change), torch.from_numpy(weight.decode()), rtol=1e-6, atol=1e-6)
    assert layer.to_weight().data.tobytes() == weight.data.tobytes()
    assert layer.to_weight().shape == weight.shape


@pytest.mark.parametrize("kind", sorted(HALVES))
def test_a_tuned_weight_is_stored_as_what_it_computes_with(kind: str) -> None:
    layer = TunableLinear(rounded(kind))
    layer.change.data.uniform_(-0.1, 0.1)
    stored = torch.from_numpy(layer.to_weight().decode())
    # Half precision of the numbers is all that is lost.
    torch.testing.assert_close(stored, layer.matrix(layer.change).detach(), rtol=2e-3, atol=4e-3)
    assert (stored - torch.from_numpy(rounded(kind).decode())).abs().max() > 0.02


@pytest.mark.parametrize(("kind", "per_group"), [("Q4_0", 1), ("Q4_1", 1), ("Q4_K", 1), ("Q6_K", 1), ("Q5_0", 4)])
def test_gradients_are_the_slopes_of_the_outputs(kind: str, per_group: int) -> None:
    layer = TunableLinear(rounded(kind), per_group).double()
    layer.numbers = layer.numbers.double()
    layer.patterns = [pattern.double() for pattern in layer.patterns]
    layer.change.data.uniform_(-0.1, 0.1)
    x = torch.randn(3, COLUMNS, dtype=torch.float64, requires_grad=True)

    def dense(x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        together, alone = change[..., :1], change[..., 1:] / 8
        factors = torch.cat([together, together + alone] if alone.shape[-1] else [together], dim=-1)
        numbers = layer.numbers * (1 + factors.repeat_interleave(per_group, dim=1))
        blocks = [p.view(ROWS, numbers.shape[1], -1) * numbers[:, :, i, None] for i, p in enumerate(layer.patterns)]
        return x @ sum(blocks).view(ROWS, COLUMNS).T

    wanted = torch.autograd.grad(dense(x, layer.change).square().sum(), (x, layer.change))
    found = torch.autograd.grad(layer(x).square().sum(), (x, layer.change))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_blocks_of_a_group_keep_one_scale() -> None:
    values = np.random.default_rng(0).integers(-8, 8, (ROWS, COLUMNS)).astype(np.float32)
    values[:, ::32] = -8  # the scale of every block is then 1
    layer = TunableLinear(Weight.from_array(values, "Q4_0"), 4)
    assert layer.change.shape == (ROWS, COLUMNS // 128, 1)
    layer.change.data.normal_(0, 0.1)
    stored = layer.to_weight().data.reshape(ROWS, -1, 18)[:, :, :2].copy().view(np.float16)[..., 0]
    assert (stored.reshape(ROWS, -1, 4) == stored.reshape(ROWS, -1, 4)[..., :1]).all()


def test_a_scale_beyond_half_precision_is_said() -> None:
    layer = TunableLinear(rounded("Q4_0"))
    layer.change.data[0, 0, 0] = 1e9
    with pytest.raises(CheckpointError, match="half precision"):
        layer.to_weight()
