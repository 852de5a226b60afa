"""Losses on preferred and judged answers: small functions of sequences' log-probabilities.

    r = β · (log π(y|x) − log π_ref(y|x))                         the implicit reward of an answer
    sigmoid   −(1−ε) log σ(r_chosen − r_rejected) − ε log σ(r_rejected − r_chosen)
    ipo       (Δ/n_chosen − Δ'/n_rejected − 1/(2β))²              Δ, Δ' the log ratios of both, n their tokens
    kto       λ (1 − σ(r − β z)) for good answers, λ' (1 − σ(β z − r)) for bad ones

What this leaves out: models, batches, and the reference's log-probabilities, which are inputs.

Source: DPO (arXiv 2305.18290) eq. 7; conservative DPO (Mitchell, 2023) for ε; IPO (arXiv 2310.12036) eq. 17, with the
mean over tokens that its authors recommend; KTO (arXiv 2402.01306) eq. 7 and 8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_losses(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of every pair, (n), from the log ratios of both answers, (n) each."""
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo_losses(chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, beta: float) -> Tensor:
    """Return the loss of every pair, (n), from the log ratios of both answers and their tokens, (n) each."""
    difference = chosen / chosen_tokens - rejected / rejected_tokens
    return (difference - 1 / (2 * beta)).square()


def kto_losses(
    log_ratios: Tensor, is_good: Tensor, drift: Tensor, beta: float, good_weight: float = 1.0, bad_weight: float = 1.0
) -> Tensor:
    """Return the loss of every answer, (n).

    Args:
        log_ratios: of the answers, (n).
        is_good: their verdicts, bool (n).
        drift: the model's divergence from the reference, at least 0, a number without gradient.
        beta: how much a log ratio counts.
        good_weight: of good answers.
        bad_weight: of bad ones.
    """
    good = good_weight * (1 - torch.sigmoid(beta * (log_ratios - drift)))
    bad = bad_weight * (1 - torch.sigmoid(beta * (drift - log_ratios)))
    return torch.where(is_good, good, bad)
