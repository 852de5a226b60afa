"""What a sequence takes over from the cache instead of computing it, and what it leaves there for others.

Full blocks are shared as they are. A block that agrees only in its beginning is copied into one of the sequence's own.
Either is exact: keys and values of a position depend on the tokens up to it and on nothing else.
Left out: which block holds what (`cache.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from minicpm.engine.cache import BlockPool, Digest, Match, Tokens, num_common
from minicpm.engine.sequence import Sequence

# Copies one block's keys and values into another; called between steps only.
CopyBlock = Callable[[int, int], None]
# A part of fewer positions, such as a beginning that all texts have, is computed.
_LEAST_COPIED = 4


def adopt(sequence: Sequence, pool: BlockPool) -> None:
    """Take over full blocks of the cache that hold the next tokens.

    Own blocks that were set aside for those positions are given back.
    """
    size = pool.block_tokens
    while sequence.num_computed % size == 0 and sequence.num_computed + size <= sequence.num_reusable:
        index = sequence.num_computed // size
        block = pool.share(sequence.digest(index, size))
        if block is None:
            break
        if index < len(sequence.blocks):
            pool.release([sequence.blocks[index]])
            sequence.blocks[index] = block
        else:
            sequence.blocks.append(block)
        sequence.num_published = index + 1
        sequence.num_tabled = min(sequence.num_tabled, index)
        sequence.count_cached(size)


def copy_part(sequence: Sequence, pool: BlockPool, copy: CopyBlock) -> None:
    """Copy the beginning of the next block, for which one is set aside, where the cache has it."""
    match = _find(sequence, pool)
    if match is not None and match.num_tokens >= _LEAST_COPIED:
        copy(match.block, sequence.blocks[sequence.num_computed // pool.block_tokens])
        sequence.count_cached(match.num_tokens)


def publish(sequence: Sequence, pool: BlockPool) -> None:
    """Let other sequences find the blocks that are full by now and, of a prompt, the one that is being filled."""
    size = pool.block_tokens
    for index in range(sequence.num_published, sequence.num_computed // size):
        pool.publish(sequence.blocks[index], sequence.digest(index, size))
        _offer(sequence, pool, index)
        sequence.num_published = index + 1
    if sequence.num_computed <= sequence.num_prompt_tokens:
        _offer(sequence, pool, sequence.num_computed // size)


def drop_blocks(sequence: Sequence, pool: BlockPool) -> None:
    """Give every block back; what was computed must be computed, or found in the cache, again."""
    _offer(sequence, pool, sequence.num_computed // pool.block_tokens)
    pool.release(sequence.blocks)
    sequence.blocks.clear()
    sequence.num_computed = sequence.num_published = sequence.num_tabled = 0


def _offer(sequence: Sequence, pool: BlockPool, index: int) -> None:
    begin = index * pool.block_tokens
    tokens = tuple(sequence.token_ids[begin : min(begin + pool.block_tokens, sequence.num_computed)])
    if tokens:
        pool.offer(sequence.blocks[index], _digest_before(sequence, index, pool.block_tokens), tokens)


def _digest_before(sequence: Sequence, index: int, block_tokens: int) -> Digest:
    return sequence.digest(index - 1, block_tokens) if index else b""


def _find(sequence: Sequence, pool: BlockPool) -> Match | None:
    wanted = _next_tokens(sequence, pool.block_tokens)
    return pool.find(*wanted) if wanted else None


def _next_tokens(sequence: Sequence, block_tokens: int) -> tuple[Digest, Tokens] | None:
    """What of the next block need not be computed by `sequence` itself, and the digest before; None within a block."""
    begin = sequence.num_computed
    if begin % block_tokens or begin >= sequence.num_reusable:
        return None
    tokens = tuple(sequence.token_ids[begin : min(begin + block_tokens, sequence.num_reusable)])
    return _digest_before(sequence, begin // block_tokens, block_tokens), tokens


class Claims:
    """What the sequences of one step compute, so that others who want the same wait for it and take it over."""

    def __init__(self, pool: BlockPool, *, has_parts: bool) -> None:
        """Begin a step; `has_parts` says whether parts of blocks are taken over, too."""
        self._pool = pool
        self._has_parts = has_parts
        self._claimed: dict[Digest, list[Tokens]] = {}

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that `sequence` computes its next `num_tokens` tokens."""
        size, end = self._pool.block_tokens, sequence.num_computed + num_tokens
        for index in range(sequence.num_computed // size, -(-end // size)):
            tokens = tuple(sequence.token_ids[index * size : min(end, (index + 1) * size)])
            self._claimed.setdefault(_digest_before(sequence, index, size), []).append(tokens)

    def concern(self, sequence: Sequence) -> bool:
        """Whether `sequence` had better wait: for a full block, or for half of what it has to compute.

        One that writes nothing waits for less, as it has no first token that would be late.
        """
        wanted = _next_tokens(sequence, self._pool.block_tokens)
        claimed = self._claimed.get(wanted[0]) if wanted else None
        if not wanted or not claimed:
            return False
        num_shared = max(num_common(wanted[1], tokens) for tokens in claimed)
        if num_shared == self._pool.block_tokens or not self._has_parts:
            return num_shared == self._pool.block_tokens
        match = self._pool.find(*wanted)
        num_gained = num_shared - (match.num_tokens if match else 0)
        is_patient = sequence.max_new_tokens == 0
        return num_gained >= _LEAST_COPIED and (is_patient or 2 * num_gained >= sequence.num_pending)
