"""The keys and values of the positions already seen, allocated once.

All sequences of a cache have the same length: it serves sampling during training, evaluation and tests. Serving
many requests at once, with pages and prefix sharing, is the engine's work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError


class KVCache:
    """Room for `capacity` positions of `batch_size` sequences; `length` of them are filled.

    Memory is `config.kv_cache_bytes(batch_size * capacity)` for a 16-bit dtype, twice that for float32.

    Raises:
        ConfigError: a capacity or batch size below 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        batch_size: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if capacity < 1 or batch_size < 1:
            raise ConfigError(f"a KV cache needs room for 1 position and 1 sequence, got {capacity} and {batch_size}")
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)  # (B, K, S, D)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.batch_size = batch_size
        self.capacity = capacity
        self.length = 0

    def check_room(self, batch_size: int, num_positions: int) -> None:
        """Return if `num_positions` more fit.

        Raises:
            ConfigError: another batch size than the cache's, or too many positions.
        """
        if batch_size != self.batch_size:
            raise ConfigError(f"the KV cache holds {self.batch_size} sequences and got a batch of {batch_size}")
        if self.length + num_positions > self.capacity:
            raise ConfigError(
                f"the KV cache has room for {self.capacity} positions, {self.length} are filled and "
                f"{num_positions} more were given; make it larger"
            )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values (B, K, T, D) and return all of that layer's, (B, K, S, D) views.

        `length` moves only by `advance`, once all layers have written.
        """
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, num_positions: int) -> None:
        """Count `num_positions` more as filled."""
        self.length += num_positions

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            ConfigError: `length` is not within what is filled.
        """
        if not 0 <= length <= self.length:
            raise ConfigError(f"cannot truncate a KV cache of {self.length} positions to {length}")
        self.length = length
