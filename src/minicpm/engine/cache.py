"""The bookkeeping of the paged KV cache: which block belongs to whom, and which hold a prefix that can be used again.

A block is `block_tokens` consecutive positions of keys and values of all layers. Full blocks are known by a digest that
chains over everything before them, so two sequences with a common beginning share its blocks. Blocks that nobody holds
keep their content until the space is needed; the one unused for longest goes first.
Left out: the keys and values themselves (the decoder's), and who gets a block when there are too few (`scheduler.py`).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

Digest = bytes


def chain_digest(previous: Digest, token_ids: Sequence[int]) -> Digest:
    """The digest of a full block whose sequence up to it has the digest `previous` (empty at the start).

    It is cryptographic: a request could otherwise be made to collide with another's prompt and read its answers.
    """
    from hashlib import blake2b

    return blake2b(previous + array("i", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks, each free, held by one or more sequences, or kept for its content. Not thread-safe."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._num_holders = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._digests: dict[int, Digest] = {}
        self._by_digest: dict[Digest, int] = {}
        # Blocks with content and no holder, the longest unused first.
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """How many blocks `take` can give."""
        return len(self._empty) + len(self._kept)

    @property
    def num_held(self) -> int:
        """How many blocks sequences hold; a shared one counts once."""
        return self.num_blocks - self.num_available

    @property
    def num_kept(self) -> int:
        """How many blocks nobody holds but hold a prefix that may come again."""
        return len(self._kept)

    def take(self) -> int | None:
        """Return a block of one holder with nothing in it, or None when all are held."""
        if self._empty:
            block = self._empty.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._num_holders[block] = 1
        return block

    def share(self, digest: Digest) -> int | None:
        """Return the block that holds the content `digest`, with one more holder, or None."""
        block = self._by_digest.get(digest)
        if block is None:
            return None
        if not self._num_holders[block]:
            del self._kept[block]
        self._num_holders[block] += 1
        return block

    def digests(self, ids: Sequence[int]) -> Iterator[Digest]:
        """The digests of the full blocks of `ids`, first to last."""
        digest, size = b"", self.block_tokens
        for start in range(0, len(ids) - size + 1, size):
            digest = chain_digest(digest, ids[start : start + size])
            yield digest

    def publish(self, block: int, digest: Digest) -> None:
        """Let others find the full `block` by its content; of two with the same content the first stays known."""
        if digest not in self._by_digest and block not in self._digests:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one hold on each of `blocks`, which stand in the order of the sequence."""
        # The end of a prefix is worth less than its beginning, which more sequences have in common: it goes first.
        for block in reversed(list(blocks)):
            assert self._num_holders[block] > 0, "a block is released once per hold"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if block in self._digests:
                self._kept[block] = None
            else:
                self._empty.append(block)

    def _forget(self, block: int) -> None:
        del self._by_digest[self._digests.pop(block)]
