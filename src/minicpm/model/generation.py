"""Small generation with a cache, for samples during training and for tests.

What this leaves out: speed, batches of unequal prompts, stop strings and chat; those are the engine's.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from minicpm.errors import ConfigError
from minicpm.model.cache import KVCache
from minicpm.model.minicpm import MiniCPM


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return `logits` (B, V) with −∞ outside the `top_k` best (0: all) and outside the smallest set of mass `top_p`.

    The best token always stays; `top_p` is taken of what `top_k` left.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        dropped = (mass_before >= top_p).scatter(-1, order, mass_before >= top_p)
        dropped.scatter_(-1, order[..., :1], False)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


@torch.no_grad()
def generate(
    model: MiniCPM,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Collection[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the new ids, (B, at most `max_new_tokens`), without the prompt; the stop id that ended a row is kept.

    Rows that stopped earlier than others are filled with their stop id. The model's training mode is left alone: it
    has no dropout unless LoRA brought some, so put it into `eval()` first where that matters.

    Args:
        model: the network.
        input_ids: prompts of one length, (B, T), T ≥ 1.
        max_new_tokens: at least 1.
        temperature: 0 takes the best token.
        top_k: 0 keeps all.
        top_p: in (0, 1].
        stop_ids: ids that end a row; None takes the config's eos ids.
        generator: source of randomness, on the model's device.

    Raises:
        ConfigError: an empty prompt, or a setting out of range.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise ConfigError(f"input_ids must be (sequences, at least one token), got {tuple(input_ids.shape)}")
    if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            "generation needs max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1; got "
            f"{max_new_tokens}, {temperature}, {top_k}, {top_p}"
        )
    stops = torch.tensor(sorted(model.config.eos_token_id if stop_ids is None else stop_ids), device=input_ids.device)
    embedding = model.model.embed_tokens.weight
    batch, length = input_ids.shape
    cache = KVCache(model.config, length + max_new_tokens, batch, dtype=_cache_dtype(model), device=embedding.device)
    new: list[Tensor] = []
    is_done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    given = input_ids
    while len(new) < max_new_tokens and not bool(is_done.all()):
        logits = model.head(model.hidden_states(given, cache=cache)[:, -1])  # (B, V)
        if temperature == 0:
            chosen = logits.argmax(dim=-1)
        else:
            kept = filter_logits(logits / temperature, top_k=top_k, top_p=top_p).softmax(dim=-1)
            chosen = torch.multinomial(kept, 1, generator=generator)[:, 0]
        if new:
            chosen = torch.where(is_done, new[-1], chosen)
        new.append(chosen)
        is_done = is_done | torch.isin(chosen, stops)
        given = chosen[:, None]
    return torch.stack(new, dim=1)


def _cache_dtype(model: MiniCPM) -> torch.dtype:
    weight = model.model.embed_tokens.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
