"""The bookkeeping of the paged KV cache: which block belongs to whom, and which hold a prefix that can be used again.

A block is `block_tokens` consecutive positions of keys and values of all layers. Full blocks are known by a digest that
chains over everything before them, so two sequences with a common beginning share its blocks. Any block, full or not,
is known by the digest of what is before it and by its tokens, so that one who agrees with a part of it may copy that.
Blocks that nobody holds keep their content until the space is needed; the one unused for longest goes first.
Left out: the keys and values themselves (the decoder's), and who gets a block when there are too few (`scheduler.py`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Digest = bytes
Tokens = tuple[int, ...]


def chain_digest(previous: Digest, token_ids: Sequence[int]) -> Digest:
    """The digest of a full block whose sequence up to it has the digest `previous` (empty at the start).

    It is cryptographic: a request could otherwise be made to collide with another's prompt and read its answers.
    """
    from hashlib import blake2b

    return blake2b(previous + array("i", token_ids).tobytes(), digest_size=16).digest()


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return min(len(one), len(other))


class Match(NamedTuple):
    """The first `num_tokens` positions of `block` are the ones looked for."""

    block: int
    num_tokens: int


class BlockPool:
    """`num_blocks` blocks, each free, held by one or more sequences, or kept for its content. Not thread-safe."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._num_holders = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._digests: dict[int, Digest] = {}
        self._by_digest: dict[Digest, int] = {}
        # Where blocks with content stand in `_children`, which has in order what follows each digest.
        self._places: dict[int, tuple[Digest, Tokens]] = {}
        self._children: dict[Digest, list[tuple[Tokens, int]]] = {}
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

    def offer(self, block: int, previous: Digest, tokens: Tokens) -> None:
        """Let others copy `block`, which holds `tokens`, one or more, after what has the digest `previous`."""
        if self._places.get(block) != (previous, tokens):
            self._withdraw(block)
            self._places[block] = previous, tokens
            insort(self._children.setdefault(previous, []), (tokens, block))

    def find(self, previous: Digest, tokens: Tokens) -> Match | None:
        """Return the block that begins with most of `tokens` after `previous`, with its content as recently used."""
        children = self._children.get(previous)
        if not children or not tokens:
            return None
        # In their order those that agree in most tokens stand next to each other.
        place = bisect_left(children, (tokens, -1))
        num_tokens, block = max((num_common(tokens, near), block) for near, block in children[max(0, place - 1) :][:2])
        if num_tokens and block in self._kept:
            self._kept.move_to_end(block)
        return Match(block, num_tokens) if num_tokens else None

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one hold on each of `blocks`, which stand in the order of the sequence."""
        # The end of a prefix is worth less than its beginning, which more sequences have in common: it goes first.
        for block in reversed(list(blocks)):
            assert self._num_holders[block] > 0, "a block is released once per hold"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if block in self._digests or (block in self._places and not self._is_repeated(block)):
                self._kept[block] = None
            else:
                self._withdraw(block)
                self._empty.append(block)

    def _is_repeated(self, block: int) -> bool:
        """Whether another block begins with all that `block` holds."""
        previous, tokens = self._places[block]
        children = self._children[previous]
        place = bisect_left(children, (tokens, block))
        near = children[max(0, place - 1) : place] + children[place + 1 : place + 2]
        return any(other[: len(tokens)] == tokens for other, _ in near)

    def _withdraw(self, block: int) -> None:
        if block not in self._places:
            return
        previous, tokens = self._places.pop(block)
        children = self._children[previous]
        del children[bisect_left(children, (tokens, block))]
        if not children:
            del self._children[previous]

    def _forget(self, block: int) -> None:
        self._withdraw(block)
        if block in self._digests:
            del self._by_digest[self._digests.pop(block)]
