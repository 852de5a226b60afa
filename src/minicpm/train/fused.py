"""The decoder's forward and backward pass, arranged for speed; the same numbers as `MiniCPM.hidden_states`.

Three things are slow in the plain model on a CPU, and are done otherwise here:

- the backward pass of the flash-attention kernel: recomputed in blocks of queries, each against the keys up to its own
  last, with scores and softmax in float32 (compiled layers only);
- element-wise work: one decoder layer is compiled, and all layers share that code (their weights are its inputs);
- the embedding's gradient, which PyTorch sums in the dtype of the weights: in bf16 a frequent token's thousandth
  contribution would vanish. Here it is summed in float32.

Processors with AVX512-BF16 but without AMX multiply float32 faster than bf16. There the layers are *widened*: what is
kept stays bf16, and the factors of every product are float32 (the same values, exactly).

What this leaves out: caches, dropout, and every other way to run the model; a test holds it to the plain one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as partitioning

from minicpm.model.attention import document_mask, document_starts
from minicpm.model.minicpm import MiniCPM
from minicpm.model.rope import rotate, rotation_table
from minicpm.train.recompute import computed_twice, make_rooms

QUERY_BLOCK = 128
Layer = Callable[..., Tensor]


def hidden_states(
    model: MiniCPM,
    input_ids: Tensor,
    *,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
    is_compiled: bool = False,
    is_widened: bool = False,
) -> Tensor:
    """Return the final normed hidden states (B, T, E) of packed rows.

    Args:
        model: the network, whose `checkpoint_every` is honoured; its projections may be wrapped.
        input_ids: (B, T).
        positions: (B or 1, T); by default they count from each document's first token.
        document_ids: (B, T); without them each row is one document.
        is_compiled: whether the layers run as compiled code.
        is_widened: whether compiled layers multiply in float32.
    """
    length = input_ids.shape[1]
    mask = starts = None
    if document_ids is not None:
        starts = document_starts(document_ids)
        mask = document_mask(starts)
    if positions is None:
        positions = torch.arange(length, device=input_ids.device)[None]
        positions = positions if starts is None else positions - starts
    h = embed(model, input_ids)
    cos, sin = rotation_table(model.config.rope_frequencies(length), positions)
    layer_forward = compiled_layer(is_widened) if is_compiled else plain_layer
    every = model.checkpoint_every if torch.is_grad_enabled() else 0
    rooms = make_rooms(h, len(model.model.layers[::every]) if every else 0)
    for index, layer in enumerate(model.model.layers):
        if every and index % every == 0:
            h = computed_twice(rooms[index // every], layer_forward, layer, h, cos, sin, mask, starts)
        else:
            h = layer_forward(layer, h, cos, sin, mask, starts)  # (B, T, E)
    normed: Tensor = model.model.norm(h)
    return normed


def embed(model: MiniCPM, input_ids: Tensor) -> Tensor:
    """Return the scaled embeddings (B, T, E), with a float32 sum behind their gradient."""
    embedding = model.model.embed_tokens
    if not isinstance(embedding, nn.Embedding) or not embedding.weight.requires_grad:
        return model.embed(input_ids)
    looked_up: Tensor = _Embedding.apply(input_ids, embedding.weight)  # type: ignore[no-untyped-call]  # torch gives `apply` no types
    return looked_up * model.config.scale_emb


def plain_layer(layer: Any, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, starts: Tensor | None) -> Tensor:
    """Return the next residual stream by the layer itself: uncompiled, `decoder_layer` is slower."""
    result: Tensor = layer(h, (cos, sin), mask)
    return result


def decoder_layer(
    layer: Any,
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    is_widened: bool = False,
) -> Tensor:
    """Return the next residual stream (B, T, E) of one `DecoderLayer`."""
    attention, mlp = layer.self_attn, layer.mlp
    project = widened if is_widened else call
    batch, length, _ = h.shape
    split = (batch, length, -1, attention.head_dim)
    x = layer.input_layernorm(h)
    q = rotate(project(attention.q_proj, x).view(split).transpose(1, 2), cos, sin)  # (B, H, T, D)
    k = rotate(project(attention.k_proj, x).view(split).transpose(1, 2), cos, sin)  # (B, K, T, D)
    v = project(attention.v_proj, x).view(split).transpose(1, 2)  # (B, K, T, D)
    if attention.is_grouped:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    rest = (mask, starts, attention.scale, is_widened)
    out: Tensor = _Attention.apply(q, k, v, *rest)  # type: ignore[no-untyped-call]  # torch gives `apply` no types
    merged = project(attention.o_proj, out.transpose(1, 2).reshape(batch, length, -1))
    h = h + merged * layer.residual_scale
    x = layer.post_attention_layernorm(h)
    gated = F.silu(project(mlp.gate_proj, x)) * project(mlp.up_proj, x)  # (B, T, F)
    result: Tensor = h + project(mlp.down_proj, gated) * layer.residual_scale
    return result


def call(module: Any, x: Tensor) -> Tensor:
    """Return what `module` makes of `x`."""
    result: Tensor = module(x)
    return result


def widened(module: Any, x: Tensor) -> Tensor:
    """Return the same, multiplied in float32 and rounded once; what is wrapped (an adapter) computes as it does."""
    if type(module) is not nn.Linear:
        return call(module, x)
    return F.linear(x.float(), module.weight.float()).to(x.dtype)


@functools.cache
def compiled_layer(is_widened: bool) -> Layer:
    """Return `decoder_layer` compiled once for this process; each new shape compiles again."""
    compiled: Layer = torch.compile(functools.partial(decoder_layer, is_widened=is_widened), dynamic=False)
    if not is_widened:
        return compiled

    def run(*arguments: Any) -> Tensor:
        # Otherwise the compiler keeps the factors of the backward products as they were multiplied, in float32.
        with partitioning.patch(ban_recompute_materialized_backward=False):
            return compiled(*arguments)

    return run


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.shape = weight.shape
        return F.embedding(input_ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (input_ids,) = ctx.saved_tensors
        rows, inverse = input_ids.reshape(-1).unique(return_inverse=True)
        sums = torch.zeros(len(rows), grad.shape[-1], dtype=torch.float32, device=grad.device)
        sums.index_add_(0, inverse, grad.reshape(-1, grad.shape[-1]).float())
        weight_grad = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        return None, weight_grad.index_copy_(0, rows, sums.to(grad.dtype))


class _Attention(torch.autograd.Function):
    """Causal attention within documents: the flash kernel forward, blocks of queries backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        starts: Tensor | None,
        scale: float,
        is_widened: bool,
    ) -> Tensor:
        factors = torch.float32 if is_widened else q.dtype
        out = F.scaled_dot_product_attention(
            q.to(factors), k.to(factors), v.to(factors), attn_mask=mask, is_causal=mask is None, scale=scale
        ).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, starts)
        ctx.scale, ctx.factors = scale, factors
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, starts = ctx.saved_tensors
        slopes = attention_backward(q, k, v, out, grad, starts, ctx.scale, ctx.factors)
        return (*slopes, None, None, None, None)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    starts: Tensor | None,
    scale: float,
    factors: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, (B, H, T, D) each, from that of `out`.

    `starts` (B, T) is where each query's document begins; None is 0 everywhere. Scores are products of float32 values:
    in bf16 a score of 20 would be off by 0.06 and its probability by 6 %. The other products have `factors`.
    """
    batch, heads, length, width = q.shape
    q, k, v, out, grad = (t.reshape(batch * heads, length, width) for t in (q, k, v, out, grad))
    delta = (out.float() * grad.float()).sum(-1, keepdim=True)  # (BH, T, 1)
    q_exact, k_exact = q.float() * scale, k.float()
    dtype, q, k, v, grad = q.dtype, *(t.to(factors) for t in (q, k, v, grad))
    keys = torch.arange(length, device=q.device)
    blocks, grad_k, grad_v = [], torch.zeros_like(k_exact), torch.zeros_like(k_exact)
    for begin in range(0, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        block = slice(begin, end)
        scores = torch.bmm(q_exact[:, block], k_exact[:, :end].transpose(1, 2))  # (BH, t, s)
        hidden = keys[None, None, :end] > keys[None, block, None]
        if starts is not None:
            before = keys[None, None, :end] < starts[:, block, None]
            hidden = (hidden | before).repeat_interleave(heads, dim=0)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        slope = torch.bmm(grad[:, block], v[:, :end].transpose(1, 2)).float()
        slope = ((slope - delta[:, block]) * weights * scale).to(factors)  # of the unscaled products
        grad_v[:, :end] += torch.bmm(weights.to(factors).transpose(1, 2), grad[:, block])
        grad_k[:, :end] += torch.bmm(slope.transpose(1, 2), q[:, block])
        blocks.append(torch.bmm(slope, k[:, :end]))
    shape = (batch, heads, length, width)
    grad_q, grad_k, grad_v = (t.to(dtype).view(shape) for t in (torch.cat(blocks, 1), grad_k, grad_v))
    return grad_q, grad_k, grad_v
