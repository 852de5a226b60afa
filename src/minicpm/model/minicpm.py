"""The whole network: embedding, layers, norm, head, with the parameter names of the HF checkpoint.

    h = embed(ids) · scale_emb
    for each layer:  h = h + attention(norm(h)) · s;  h = h + mlp(norm(h)) · s      s = scale_depth / √layers
    logits = (norm(h) / (hidden_size / dim_model_base)) · headᵀ

Llama and Granite are the same graph with other scales. What this leaves out: the loss (training takes
`hidden_states` and calls `head` in pieces, so that full logits never exist), dropout, and mixtures of experts.

Source: MiniCPM technical report (arXiv 2404.06395) table 7; OpenBMB/MiniCPM `modeling_minicpm.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError
from minicpm.model.attention import chunk_mask, document_mask, document_starts
from minicpm.model.cache import KVCache
from minicpm.model.layers import DecoderLayer, RMSNorm
from minicpm.model.rope import rotation_table


class Decoder(nn.Module):
    """Embedding, layers and final norm: what HF checkpoints name `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MiniCPM(nn.Module):
    """A causal language model of the MiniCPM family; `state_dict()` has exactly `config.weight_shapes()`.

    A tied head is no parameter: it is the embedding, read twice. Parameters are PyTorch's defaults until
    `minicpm.model.initialize` or `load_model` has set them.

    `checkpoint_every` n > 0 recomputes the layers of every n-th place in the backward pass instead of keeping their
    activations (1: all layers, 2: every second); it has no effect where no gradient is asked for.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, False)
        self.checkpoint_every = 0

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, E): the embedding where the head is tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the scaled embeddings (B, T, E) of `input_ids` (B, T)."""
        embedded: Tensor = self.model.embed_tokens(input_ids)
        return embedded * self.config.scale_emb

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the final normed hidden states (B, T, E), from which `head` makes logits.

        Args:
            input_ids: (B, T). Exactly one of this and `inputs_embeds` is given.
            inputs_embeds: (B, T, E), used as they are: **not** multiplied by `scale_emb` (`embed` does that), since
                vision states enter the network unscaled.
            positions: (B or 1, T); by default they count from the cache's length or from each document's first token.
            document_ids: (B, T). Tokens attend within their unbroken run of one id only, and positions restart there.
            cache: read, extended and advanced. Not together with `document_ids`.

        Raises:
            ConfigError: a forbidden combination, or no room in the cache.
        """
        h = self._inputs(input_ids, inputs_embeds)
        mask: Tensor | None = None
        longest = cache.capacity if cache is not None else h.shape[1]
        if document_ids is not None:
            if cache is not None:
                raise ConfigError("document_ids and cache were both given; packed documents run without a cache")
            starts = document_starts(document_ids)
            mask = document_mask(starts)
            if positions is None:
                positions = torch.arange(h.shape[1], device=h.device) - starts
        elif cache is not None:
            cache.check_room(h.shape[0], h.shape[1])
            if cache.length and h.shape[1] > 1:
                mask = chunk_mask(h.shape[1], cache.length + h.shape[1], h.device)
        if positions is None:
            positions = torch.arange(h.shape[1], device=h.device)[None] + (cache.length if cache is not None else 0)
        h = self._run_layers(h, rotation_table(self.config.rope_frequencies(longest), positions), mask, cache)
        if cache is not None:
            cache.advance(h.shape[1])
        normed: Tensor = self.model.norm(h)
        return normed

    def head(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (…, V) of `hidden_states`' (…, E); the division comes before the product."""
        scaled = hidden / self.config.logit_divisor
        logits: Tensor = F.linear(scaled, self.head_weight) if self.lm_head is None else self.lm_head(scaled)
        return logits.to(torch.float32)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return float32 logits (B, T, V); the arguments are those of `hidden_states`."""
        return self.head(
            self.hidden_states(
                input_ids, inputs_embeds=inputs_embeds, positions=positions, document_ids=document_ids, cache=cache
            )
        )

    def _inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None and input_ids is None:
            return inputs_embeds
        if input_ids is None or inputs_embeds is not None:
            given = "neither" if input_ids is None else "both"
            raise ConfigError(f"give exactly one of input_ids and inputs_embeds; {given} was given")
        return self.embed(input_ids)

    def _run_layers(
        self, h: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        every = self.checkpoint_every if cache is None and torch.is_grad_enabled() else 0
        for index, layer in enumerate(self.model.layers):
            if every and index % every == 0:
                h = checkpoint(layer, h, rotation, mask, use_reentrant=False)
            else:
                h = layer(h, rotation, mask, cache)  # (B, T, E)
        return h
