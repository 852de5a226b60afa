"""Our losses on answers against trl's own code on one batch: values and the gradients of all log-probabilities.

trl's trainers compute their losses in a method that also logs; it runs here on a trainer that was never built, with a
model that tells it the log-probabilities which ours is given.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minicpm.train.preference import dpo_losses, ipo_losses, kto_losses

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

BETA = 0.3


class Told(torch.nn.Module):
    """A model of which only the log-probabilities of given tokens are asked."""

    def __init__(self, *told: Tensor) -> None:
        super().__init__()
        self.told = list(told)

    def forward(self, **kwargs: Any) -> Any:
        values = self.told.pop(0)
        zeros = torch.zeros_like(values)
        return SimpleNamespace(log_probs=values, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trainer(**settings: Any) -> Any:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t, unwrap_model=lambda m: m
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, beta=BETA,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **settings,
    )  # fmt: skip


@pytest.fixture
def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of tokens (6, 9) with answers of unlike lengths, their mask, and a reference's sums (6)."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(6, 9)
    for row, (first, last) in enumerate([(2, 9), (4, 7), (1, 8), (3, 9), (5, 6), (2, 4)]):
        mask[row, first:last] = 1
    told = -torch.rand(6, 9, generator=generator) * 3 * mask
    reference = -torch.rand(6, generator=generator) * 9
    return told, mask, reference


def inputs_of(mask: Tensor, reference: Tensor) -> dict[str, Tensor]:
    whole = torch.nn.functional.pad(mask, (1, 0))
    ids = torch.ones_like(whole, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": whole.long()}


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_pairs(kind: str, numbers: tuple[Tensor, Tensor, Tensor]) -> None:
    told, mask, reference = numbers
    theirs, ours = told.clone().requires_grad_(), told.clone().requires_grad_()
    chosen_reference, rejected_reference = reference.chunk(2)
    peer = trainer(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0],
        label_smoothing=0.0, use_weighting=False,
    )  # fmt: skip
    inputs = inputs_of(mask, reference)
    inputs |= {"ref_chosen_logps": chosen_reference, "ref_rejected_logps": rejected_reference}
    expected = trl.DPOTrainer._compute_loss(peer, Told(theirs), inputs, False)
    chosen, rejected = (ours.sum(dim=1) - reference).chunk(2)
    lengths = mask.sum(dim=1).chunk(2)
    losses = dpo_losses(chosen, rejected, BETA) if kind == "sigmoid" else ipo_losses(chosen, rejected, *lengths, BETA)
    check(losses.mean(), expected, ours, theirs)


def test_label_smoothing_is_the_mean_of_both_orders(numbers: tuple[Tensor, Tensor, Tensor]) -> None:
    chosen, rejected = (numbers[0].sum(dim=1) - numbers[2]).chunk(2)
    smoothed = dpo_losses(chosen, rejected, BETA, 0.2)
    both = 0.8 * dpo_losses(chosen, rejected, BETA) + 0.2 * dpo_losses(rejected, chosen, BETA)
    assert torch.allclose(smoothed, both)


def test_judged_answers(numbers: tuple[Tensor, Tensor, Tensor]) -> None:
    told, mask, reference = numbers
    good = torch.tensor([True, False, False, True, True, False])
    drifted = told.roll(1, 0) * 0.5
    drift_reference = drifted.sum(dim=1) - torch.tensor([0.9, -0.3, 0.4, 1.1, 0.2, 0.5])
    theirs, ours = told.clone().requires_grad_(), told.clone().requires_grad_()
    model = Told(drifted, theirs)
    peer = trainer(
        calculate_KL=True, precompute_ref_logps=True, loss_type="kto", desirable_weight=1.3, undesirable_weight=0.7
    )
    peer._compute_kl_logps = lambda m, b: trl.KTOTrainer._compute_kl_logps(peer, m, b)
    inputs = inputs_of(mask, reference)
    other = {f"KL_{name}": tensor for name, tensor in inputs.items()}
    inputs |= other | {"label": good, "ref_logps": reference, "ref_KL_logps": drift_reference}
    expected = trl.KTOTrainer._compute_loss(peer, model, inputs, False)
    drift = (drifted.sum(dim=1) - drift_reference).mean().clamp(min=0)
    assert drift > 0
    check(kto_losses(ours.sum(dim=1) - reference, good, drift, BETA, 1.3, 0.7).mean(), expected, ours, theirs)


def check(loss: Tensor, expected: Tensor, ours: Tensor, theirs: Tensor) -> None:
    assert abs(float(loss.detach()) - float(expected.detach())) <= 1e-6
    loss.backward()
    expected.backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert float(ours.grad.abs().max()) > 1e-3
    assert (ours.grad - theirs.grad).abs().max() <= 1e-6
