"""Steps of a `Decoder` with a clock, and what they move and compute: the numbers behind `minicpm bench`.

What this leaves out: tables and peers (`cli`), and anything above the decoder: tokens are drawn blindly, as no answer
is read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from minicpm.architecture import ModelConfig
from minicpm.engine.decoder import Decoder
from minicpm.engine.native_calls import Ints
from minicpm.errors import EngineError
from minicpm.formats.weight_map import WeightEntry

# Rows of one prefill step; what the scheduler gives the decoder at once.
PREFILL_ROWS = 512


def blocks_for(num_tokens: int, batch: int = 1, block_tokens: int = 32) -> int:
    """Return how many blocks `batch` sequences of `num_tokens` positions take."""
    return batch * -(-num_tokens // block_tokens)


def streamed_bytes(entries: Mapping[str, WeightEntry]) -> int:
    """Return the bytes of the weights that every step reads: all, but for an embedding beside a head of its own."""
    unread = "model.embed_tokens.weight" if "lm_head.weight" in entries else None
    return sum(entry.num_bytes for name, entry in entries.items() if name != unread)


def decode_bytes(
    weight_bytes: int, config: ModelConfig, context: float, batch: int = 1, value_bytes: float = 2
) -> float:
    """Return the bytes that one step of `batch` tokens must read: every weight once, and the keys and values.

    Args:
        weight_bytes: of `streamed_bytes`.
        config: the model's.
        context: positions before the token, on average over the steps.
        batch: sequences in the step.
        value_bytes: bytes of a cached key or value.
    """
    return weight_bytes + batch * context * config.kv_cache_bytes(1, value_bytes)


def prefill_operations(config: ModelConfig, num_tokens: int) -> float:
    """Return multiplications and additions of the layers' matrices; attention and the one row of the head left out."""
    return 2.0 * config.num_parameters().linear * num_tokens


def decode_operations(config: ModelConfig, batch: int = 1) -> float:
    """Return multiplications and additions of one step, the head's included, attention left out."""
    return 2.0 * batch * (config.num_parameters().linear + config.vocab_size * config.hidden_size)


class Stopwatch:
    """Times a decoder whose cache nobody else uses; sequences are laid out one after the other.

    Args:
        decoder: its `num_blocks` bound what can be timed.
        seed: of the tokens.
    """

    def __init__(self, decoder: Decoder, seed: int = 0) -> None:
        self.decoder = decoder
        self._random = np.random.default_rng(seed)

    def prefill(self, num_tokens: int, start: int = 0) -> float:
        """Run one prompt of `num_tokens` at positions from `start` on and return the seconds.

        Logits are computed after the last token only. What this leaves in the cache is a context for `decode`.

        Raises:
            EngineError: it does not fit the decoder's cache.
        """
        table = self._tables(start + num_tokens, 1)
        tokens = self._tokens(num_tokens)
        begin = time.perf_counter()
        for at in range(0, num_tokens, PREFILL_ROWS):
            rows = tokens[at : at + PREFILL_ROWS]
            wanted = [len(rows) - 1] if at + len(rows) == num_tokens else []
            positions = np.arange(start + at, start + at + len(rows), dtype=np.int32)
            self.decoder.step(rows, positions, np.zeros(len(rows), np.int32), table, np.array(wanted, np.int32))
        return time.perf_counter() - begin

    def decode(self, num_tokens: int, context: int = 0, batch: int = 1) -> float:
        """Run `num_tokens` steps of `batch` sequences, each after `context` positions, and return the seconds.

        The context is what earlier calls left in the cache.

        Raises:
            EngineError: it does not fit the decoder's cache.
        """
        tables = self._tables(context + num_tokens, batch)
        tokens = self._tokens(num_tokens * batch).reshape(num_tokens, batch)
        sequences = np.arange(batch, dtype=np.int32)
        begin = time.perf_counter()
        for i in range(num_tokens):
            self.decoder.step(tokens[i], np.full(batch, context + i, np.int32), sequences, tables, sequences)
        return time.perf_counter() - begin

    def _tokens(self, count: int) -> Ints:
        return self._random.integers(0, self.decoder.config.vocab_size, count, dtype=np.int32)

    def _tables(self, num_tokens: int, batch: int) -> Ints:
        per_sequence = blocks_for(num_tokens, 1, self.decoder.block_tokens)
        if batch * per_sequence > self.decoder.num_blocks:
            raise EngineError(
                f"{batch} sequences of {num_tokens} tokens take {batch * per_sequence} blocks; "
                f"the decoder has {self.decoder.num_blocks}"
            )
        return np.arange(batch * per_sequence, dtype=np.int32).reshape(batch, per_sequence)
