"""How far a quantized model is from the one that it was made of, both streamed over the same held-out text.

What this leaves out: tasks (`minicpm.eval`), and engines: this is float32 arithmetic on the weights of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm.architecture import ModelConfig
from minicpm.quant.stream import Context, Weights, embed, final_states, head_matrix, load_layer, run_layer
from minicpm.quant.windows import Windows

_PIECE_LOGITS = 1 << 25


@dataclass(frozen=True)
class Closeness:
    """A quantized model beside its original on one text; divergences are KL(original ‖ quantized) in nats.

    `kl_error` is the standard error of the mean over positions.
    """

    num_positions: int
    kl: float
    kl_error: float
    kl_99: float
    top1: float
    perplexity: float
    original_perplexity: float

    def describe(self) -> str:
        """Return one line for people."""
        return (
            f"KL {self.kl:.5f} ± {self.kl_error:.5f} nats (99 %: {self.kl_99:.4f}), top-1 agrees on {self.top1:.2%} of "
            f"{self.num_positions:,} positions; perplexity {self.perplexity:.4f}, "
            f"original {self.original_perplexity:.4f}"
        )


def final_hidden(config: ModelConfig, weights: Weights, windows: Windows) -> Tensor:
    """Return what the head multiplies at every scored position, (N, E)."""
    context = Context(config, windows)
    hidden = embed(config, weights, windows)
    for index in range(config.num_hidden_layers):
        run_layer(load_layer(config, weights, index), hidden, context)
    return final_states(config, weights, hidden[:, :-1][windows.is_scored])


def measure(config: ModelConfig, original: Weights, weights: Weights, windows: Windows) -> Closeness:
    """Return how `weights` differ from `original`; one layer of either is in memory at a time, and both heads."""
    states = final_hidden(config, original, windows)
    return compare_states(
        states, head_matrix(config, original), final_hidden(config, weights, windows), head_matrix(config, weights),
        windows.ids[:, 1:][windows.is_scored],
    )  # fmt: skip


def compare_states(
    states: Tensor, head: Tensor, other_states: Tensor, other_head: Tensor, targets: Tensor
) -> Closeness:
    """Return how the distributions of `other_states` (N, E) differ from those of `states`; `targets` (N,) came next."""
    step = max(1, _PIECE_LOGITS // len(head))
    kls, agreements, losses, other_losses = [], [], [], []
    for start in range(0, len(states), step):
        here = slice(start, start + step)
        logprobs = F.log_softmax(states[here] @ head.T, dim=-1)
        others = F.log_softmax(other_states[here] @ other_head.T, dim=-1)
        agreements.append(logprobs.argmax(-1) == others.argmax(-1))
        losses.append(-logprobs.gather(1, targets[here, None])[:, 0])
        other_losses.append(-others.gather(1, targets[here, None])[:, 0])
        kls.append((logprobs.exp() * (logprobs - others)).sum(-1).clamp(min=0))
    kl = torch.cat(kls).double()
    return Closeness(
        num_positions=len(kl),
        kl=float(kl.mean()),
        kl_error=float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else math.nan,
        kl_99=float(kl.quantile(0.99)),
        top1=float(torch.cat(agreements).float().mean()),
        perplexity=math.exp(min(700.0, float(torch.cat(other_losses).double().mean()))),
        original_perplexity=math.exp(min(700.0, float(torch.cat(losses).double().mean()))),
    )
