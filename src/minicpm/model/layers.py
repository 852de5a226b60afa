"""The norm, the feed-forward network and the decoder layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm.architecture import ModelConfig
from minicpm.model.attention import Attention
from minicpm.model.cache import KVCache


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, cast back before the weight (the order matters in bf16)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (…, E) normed, in `x`'s dtype where the weight has it too."""
        normed = F.rms_norm(x.to(torch.float32), x.shape[-1:], None, self.eps)
        return normed.to(x.dtype) * self.weight


class MLP(nn.Module):
    """The gated feed-forward network, down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, E) for (…, E)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Attention and feed-forward network, each branch multiplied by `config.residual_scale` before it is added."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.residual_scale = config.residual_scale

    def forward(
        self, h: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the next residual stream (B, T, E); the stream itself is never scaled."""
        h = h + self.self_attn(self.input_layernorm(h), rotation, mask, cache) * self.residual_scale
        out: Tensor = h + self.mlp(self.post_attention_layernorm(h)) * self.residual_scale
        return out
