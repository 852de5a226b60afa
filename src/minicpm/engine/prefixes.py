"""`Prefixes`: the keys and values of a text's beginning, out of an engine's KV cache and into it.

Left out: files of them (`prompt_cache.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from minicpm.engine.batch import Bytes, StepDecoder
from minicpm.engine.cache import BlockPool, Digest


class Prefixes:
    """Copies whole blocks while nothing else uses the cache."""

    def __init__(
        self, decoder: StepDecoder, pool: BlockPool, alone: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Share the engine's decoder and pool; within `alone()` it runs no step."""
        self._decoder = decoder
        self._pool = pool
        self._alone = alone

    @property
    def block_tokens(self) -> int:
        """Positions per block."""
        return self._pool.block_tokens

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self._decoder.block_bytes

    @property
    def layout(self) -> str:
        """What the bytes of a block mean."""
        return self._decoder.cache_layout

    def read(self, ids: Sequence[int]) -> Bytes:
        """Return the leading blocks of `ids` that the cache holds, uint8 (n, block_bytes)."""
        with self._alone():
            held: list[int] = []
            for digest in self._pool.digests(ids):
                block = self._pool.share(digest)
                if block is None:
                    break
                held.append(block)
            try:
                return self._decoder.read_blocks(np.array(held, np.int32))
            finally:
                self._pool.release(held)

    def write(self, ids: Sequence[int], blocks: Bytes) -> int:
        """Put the leading blocks of `ids`, uint8 (n, block_bytes), in and return how many tokens the cache holds then.

        Those that it holds already stay; those for which there is no room are left out.

        Raises:
            EngineError: blocks of another size; nothing was written.
        """
        with self._alone():
            held: list[int] = []
            new: dict[int, tuple[int, Digest]] = {}
            try:
                for index, digest in zip(range(len(blocks)), self._pool.digests(ids), strict=False):
                    block = self._pool.share(digest)
                    if block is None:
                        block = self._pool.take()
                        if block is None:
                            break
                        new[index] = (block, digest)
                    held.append(block)
                rows = blocks if len(new) == len(blocks) else blocks[[*new]]
                self._decoder.write_blocks(np.array([block for block, _ in new.values()], np.int32), rows)
                for block, digest in new.values():
                    self._pool.publish(block, digest)
            finally:
                self._pool.release(held)
            return len(held) * self._pool.block_tokens
