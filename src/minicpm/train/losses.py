"""Cross-entropy in chunks: the logits of all positions never exist at once.

Each chunk of rows makes its logits, its loss and at once the gradients of its hidden states and of the head, so the
chunk is gone before the next begins. Losses are sums over target tokens times a factor that the loop chooses (one over
the target tokens of the whole global batch), never means over a micro-batch: a mean would weigh a token by its
neighbours, and accumulation would change the loss. What this leaves out: losses on preference pairs (`preference`), and
z-loss, which the report does not use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What labels carry where nothing is to be learned; the convention of PyTorch and of every data set.
IGNORED = -100
# Logits of one chunk, float32: small enough for the outer caches to help, large enough for a product to be one.
CHUNK_BYTES = 32 << 20


def chunk_rows(vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Return the rows of one chunk, a multiple of 64 and at least 64."""
    return max(chunk_bytes // (4 * vocab_size) // 64 * 64, 64)


def even_rows(count: int, most: int) -> int:
    """Return the rows of a chunk, at most `most`, with which `count` rows make chunks of nearly one size."""
    chunks = max(-(-count // most), 1)
    return max(-(-count // chunks), 1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    divisor: float = 1.0,
    factor: float = 1.0,
    rows: int = 0,
    is_compiled: bool = False,
    is_widened: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (`factor` × the summed loss, the loss of every position); the first is differentiable, both are float32.

    The result is that of `F.cross_entropy((hidden / divisor) @ weight.T, targets, reduction="sum")`.

    Args:
        hidden: (..., E) final normed states, in the compute dtype.
        weight: the head (V, E), in the same dtype.
        targets: (...) of int64, `IGNORED` where there is none; those positions cost nothing.
        divisor: hidden_size / dim_model_base.
        factor: what the sum is multiplied by.
        rows: rows of a chunk; 0 chooses.
        is_compiled: whether a chunk's element-wise work runs as compiled code.
        is_widened: whether the products with a gradient have float32 factors (see `fused`).
    """
    shape = targets.shape
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)  # (N, E), (N)
    supervised = targets != IGNORED
    index = None if bool(supervised.all()) else supervised.nonzero().squeeze(1)
    if index is not None:
        flat, targets = flat[index], targets[index]
    rows = rows or even_rows(len(targets), chunk_rows(weight.shape[0]))
    if torch.is_grad_enabled() and (flat.requires_grad or weight.requires_grad):
        total, losses = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch gives `apply` no types
            flat, weight, targets, divisor, factor, rows, is_compiled, is_widened
        )
    else:
        losses = _losses(flat, weight, targets, divisor, rows)
        total = losses.sum() * factor
    if index is not None:
        losses = torch.zeros(shape.numel(), dtype=torch.float32, device=hidden.device).index_copy_(0, index, losses)
    return total, losses.reshape(shape)


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor, divisor: float, rows: int) -> Tensor:
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        logits = F.linear(hidden[part] / divisor, weight).to(torch.float32)
        losses[part] = F.cross_entropy(logits, targets[part], reduction="none")
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, where the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        divisor: float,
        factor: float,
        rows: int,
        is_compiled: bool,
        is_widened: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # float32: thousands of rows would be lost one by one in a bf16 sum.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        # A tensor: compiled code would be made anew for every other number.
        scale = torch.tensor(factor, dtype=torch.float32, device=hidden.device)
        slope_of = compiled_slope() if is_compiled else loss_and_slope
        factors = torch.float32 if is_widened else weight.dtype
        head = weight.to(factors)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            scaled = hidden[part].to(factors) / divisor
            losses[part], slope = slope_of(F.linear(scaled, head), targets[part], scale)
            if grad_hidden is not None:
                grad_hidden[part] = torch.mm(slope, head)
            if grad_weight is not None and slope.dtype == torch.float32:
                grad_weight.addmm_(slope.T, scaled)
            elif grad_weight is not None:
                grad_weight += torch.mm(slope.T, scaled)
        if grad_hidden is not None and divisor != 1.0:
            grad_hidden /= divisor
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum() * factor, losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [saved if saved is None else _times(saved, grad) for saved in ctx.saved_tensors]
        return (*grads, None, None, None, None, None, None)


def loss_and_slope(logits: Tensor, targets: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the float32 loss of every row, `factor` × its derivative by the logits, in the logits' dtype)."""
    exact, at = logits.to(torch.float32), targets[:, None]  # (n, V)
    top = exact.amax(dim=-1, keepdim=True)
    # One exponential for both: it is what costs here. In place from here on: a chunk is the largest thing in memory.
    slope = (exact - top).exp_()
    total = slope.sum(dim=-1, keepdim=True)
    losses = total.log() + top - exact.gather(1, at)
    slope.mul_(factor / total).scatter_add_(1, at, -factor.expand(at.shape))
    return losses.squeeze(1), slope.to(logits.dtype)


@functools.cache
def compiled_slope() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return `loss_and_slope` compiled once for this process."""
    return torch.compile(loss_and_slope)


def _times(saved: Tensor, grad: Tensor) -> Tensor:
    # Almost always exactly 1, and then a pass over the head's gradient is saved; on a GPU asking would wait for it.
    if grad.device.type == "cpu" and float(grad) == 1.0:
        return saved
    return saved * grad.to(saved.dtype)


def linear_token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, divisor: float = 1.0) -> Tensor:
    """Return the float32 cross-entropy of every position, differentiable each by itself, 0 where nothing is learned.

    The backward pass makes the logits of a chunk once more: which weight a token's loss has may depend on all others.

    Args:
        hidden: (..., E) final normed states, in the compute dtype.
        weight: the head (V, E), in the same dtype.
        targets: (...) of int64, `IGNORED` where there is none.
        divisor: hidden_size / dim_model_base.
    """
    shape = targets.shape
    index = (targets.reshape(-1) != IGNORED).nonzero().squeeze(1)
    flat, kept = hidden.reshape(-1, hidden.shape[-1])[index], targets.reshape(-1)[index]
    rows = even_rows(len(kept), chunk_rows(weight.shape[0]))
    if torch.is_grad_enabled() and (flat.requires_grad or weight.requires_grad):
        losses = _TokenCrossEntropy.apply(flat, weight, kept, divisor, rows)  # type: ignore[no-untyped-call]  # torch gives `apply` no types
    else:
        losses = _losses(flat, weight, kept, divisor, rows)
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=hidden.device)
    return whole.index_copy(0, index, losses).reshape(shape)


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, divisor: float, rows: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.divisor, ctx.rows = divisor, rows
        return _losses(hidden, weight, targets, divisor, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            scaled = hidden[part] / ctx.divisor
            slope = F.linear(scaled, weight).float().softmax(dim=-1)
            slope = slope.scatter_add_(1, targets[part, None], -torch.ones_like(slope[:, :1]))
            slope = (slope * grad[part, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = torch.mm(slope, weight) / ctx.divisor
            if grad_weight is not None:
                grad_weight += torch.mm(slope.T, scaled)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def sum_by_source(losses: Tensor, targets: Tensor, sources: Tensor, num_sources: int) -> tuple[Tensor, Tensor]:
    """Return per source (the summed loss, the number of target tokens), float64 each, (num_sources,)."""
    supervised = (targets != IGNORED).reshape(-1)
    kinds = sources.reshape(-1)[supervised].to(torch.int64)
    sums = torch.bincount(kinds, weights=losses.reshape(-1)[supervised].double(), minlength=num_sources)
    return sums, torch.bincount(kinds, minlength=num_sources).double()
