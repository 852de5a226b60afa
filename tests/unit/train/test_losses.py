"""Chunked cross-entropy against PyTorch's own on whole logits, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm.train.losses import IGNORED, chunk_rows, linear_cross_entropy, sum_by_source

E, V, N = 24, 331, 7 * 11


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 11, E, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, E, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (7, 11), generator=generator)
    targets[2, 3:9] = IGNORED
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, divisor: float, factor: float) -> Tensor:
    logits = F.linear(hidden / divisor, weight).float()
    return factor * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)


@pytest.mark.parametrize("rows", [0, 1, 10, 64, 1000])
def test_equals_whole_logits(rows: int) -> None:
    hidden, weight, targets = inputs()
    expected = plain(hidden, weight, targets, 2.5, 0.013)
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    total, losses = linear_cross_entropy(hidden, weight, targets, divisor=2.5, factor=0.013, rows=rows)
    grads = torch.autograd.grad(3.0 * total, (hidden, weight))
    # Measured 2e-7.
    torch.testing.assert_close(total, expected, rtol=2e-6, atol=0)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, 3.0 * theirs, rtol=2e-5, atol=1e-8)
    assert losses.sum().item() * 0.013 == pytest.approx(expected.item(), rel=1e-6)
    assert losses.shape == targets.shape
    assert (losses[targets == IGNORED] == 0).all()


def test_without_gradient_it_is_the_same_number() -> None:
    hidden, weight, targets = inputs()
    with_gradient, _ = linear_cross_entropy(hidden, weight, targets, divisor=2.5, rows=10)
    with torch.no_grad():
        without, losses = linear_cross_entropy(hidden, weight, targets, divisor=2.5, rows=10)
    assert without.item() == pytest.approx(with_gradient.item(), rel=1e-6)
    assert not losses.requires_grad


def test_only_one_side_wants_a_gradient() -> None:
    hidden, weight, targets = inputs()
    total, _ = linear_cross_entropy(hidden, weight.detach(), targets)
    alone = torch.autograd.grad(total, hidden)[0]
    total, _ = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(alone, torch.autograd.grad(total, hidden)[0])
    total, _ = linear_cross_entropy(hidden.detach(), weight, targets)
    assert torch.autograd.grad(total, weight)[0].shape == weight.shape


# In units of the error of whole logits in bf16: measured 1.08; widened, where only the results are rounded, 0.84.
@pytest.mark.parametrize(("is_widened", "bound"), [(False, 1.1), (True, 0.9)])
def test_bf16_is_as_true_as_whole_logits_in_bf16(is_widened: bool, bound: float) -> None:
    exact_hidden, exact_weight, targets = inputs()
    exact = torch.autograd.grad(plain(exact_hidden, exact_weight, targets, 2.5, 1.0), (exact_hidden, exact_weight))
    hidden, weight, _ = inputs(torch.bfloat16)
    whole = torch.autograd.grad(plain(hidden, weight, targets, 2.5, 1.0), (hidden, weight))
    total, _ = linear_cross_entropy(hidden, weight, targets, divisor=2.5, rows=16, is_widened=is_widened)
    ours = torch.autograd.grad(total, (hidden, weight))
    for mine, theirs, true in zip(ours, whole, exact, strict=True):
        assert (mine.float() - true).norm() <= bound * (theirs.float() - true).norm()


def test_nothing_supervised_is_zero_and_has_zero_gradient() -> None:
    hidden, weight, targets = inputs()
    total, _ = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED))
    assert total.item() == 0
    for gradient in torch.autograd.grad(total, (hidden, weight)):
        assert not gradient.any()


def test_chunks_are_bounded() -> None:
    assert chunk_rows(16384) * 16384 * 4 <= 32 << 20
    assert chunk_rows(122753) == 64


def test_sum_by_source() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 0.0]])
    targets = torch.tensor([[5, 6, 7], [8, 9, IGNORED]])
    sources = torch.tensor([[0, 2, 2], [0, 2, 1]])
    sums, counts = sum_by_source(losses, targets, sources, 4)
    assert sums.tolist() == [9, 0, 22, 0]
    assert counts.tolist() == [2, 0, 3, 0]
