"""Causal attention with grouped heads, document borders and a cache.

All of it goes through `scaled_dot_product_attention`, whose kernels keep scores and softmax in float32. On the CPU
a dense mask costs what the causal kernel costs (forward and backward, T = 512), and flex-attention has no backward
there, so packed documents get a dense mask.

What this leaves out: dropout, attention sinks, windows, biases; no MiniCPM has them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm.architecture import ModelConfig
from minicpm.model.cache import KVCache
from minicpm.model.rope import rotate


def document_starts(document_ids: Tensor) -> Tensor:
    """Return for every position the index at which its document begins, (B, T) of int64.

    A document is an unbroken run of one id: an id that comes back later in the row names another document.
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_start = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return torch.where(is_start, index, 0).cummax(dim=1).values


def document_mask(starts: Tensor) -> Tensor:
    """Return which key each query sees, its own document's up to itself: bool, (B, 1, T, T)."""
    length = starts.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=starts.device).tril()
    return (starts[:, None, :, None] == starts[:, None, None, :]) & causal


def chunk_mask(num_new: int, num_all: int, device: torch.device) -> Tensor:
    """Return which of `num_all` keys each of the last `num_new` queries sees: bool, (T, S)."""
    return torch.ones(num_new, num_all, dtype=torch.bool, device=device).tril(diagonal=num_all - num_new)


class Attention(nn.Module):
    """Grouped-query attention of one layer, without biases."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_size, bias=False)
        self.o_proj = nn.Linear(config.query_size, config.hidden_size, bias=False)
        self.head_dim = config.head_dim
        self.is_grouped = config.num_key_value_heads != config.num_attention_heads
        self.scale = config.attention_scale
        self.layer = layer

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return (B, T, E).

        Args:
            x: normed hidden states, (B, T, E).
            rotation: cosines and sines from `rotation_table`.
            mask: bool, broadcast to (B, H, T, S); None is causal from the first key on (or, for one query, all keys).
            cache: where keys and values of earlier positions are, and of these go.
        """
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        q = rotate(self.q_proj(x).view(split).transpose(1, 2), *rotation)  # (B, H, T, D)
        k = rotate(self.k_proj(x).view(split).transpose(1, 2), *rotation)  # (B, K, T, D)
        v = self.v_proj(x).view(split).transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            scale=self.scale,
            enable_gqa=self.is_grouped,
        )  # (B, H, T, D)
        merged: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))  # (B, T, E)
        return merged
