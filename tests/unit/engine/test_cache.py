"""Blocks: never two owners by accident, never lost, the least recently used one forgotten first."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm.engine.cache import BlockPool, chain_digest


def full_chain(pool: BlockPool, names: str) -> list[int]:
    """Take and publish one block per letter."""
    blocks = []
    for name in names:
        block = pool.take()
        assert block is not None
        pool.publish(block, name.encode())
        blocks.append(block)
    return blocks


def test_a_released_block_keeps_its_content_until_the_space_is_needed() -> None:
    pool = BlockPool(3, 32)
    blocks = full_chain(pool, "abc")
    assert pool.take() is None
    pool.release(blocks)
    assert (pool.num_held, pool.num_kept, pool.num_available) == (0, 3, 3)
    assert pool.share(b"a") == blocks[0]
    assert pool.num_held == 1
    # The end of the chain goes first.
    assert [pool.take(), pool.take(), pool.take()] == [blocks[2], blocks[1], None]
    assert pool.share(b"c") is None
    assert pool.share(b"a") == blocks[0]


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(1, 32)
    (block,) = full_chain(pool, "a")
    assert pool.share(b"a") == block
    pool.release([block])
    assert pool.take() is None
    pool.release([block])
    assert pool.take() == block


def test_of_two_blocks_with_one_content_the_first_stays_known() -> None:
    pool = BlockPool(2, 32)
    first, second = full_chain(pool, "aa")
    pool.release([first, second])
    assert pool.num_kept == 1
    assert pool.share(b"a") == first


def test_the_block_that_agrees_in_most_tokens_is_found() -> None:
    pool = BlockPool(8, 32)
    kept = {}
    for tokens in ((1, 2, 3), (1, 2, 9, 9), (1, 5), (7,)):
        block = pool.take()
        assert block is not None
        pool.offer(block, b"before", tokens)
        kept[tokens] = block
    for wanted, (tokens, num_tokens) in {
        (1, 2, 3, 4): ((1, 2, 3), 3), (1, 2, 9): ((1, 2, 9, 9), 3), (1, 2, 8): ((1, 2, 9, 9), 2), (1, 6): ((1, 5), 1),
        (7, 7): ((7,), 1),
    }.items():  # fmt: skip
        assert pool.find(b"before", wanted) == (kept[tokens], num_tokens)
    assert pool.find(b"before", (2, 2)) is None
    assert pool.find(b"before", ()) is None
    assert pool.find(b"elsewhere", (1, 2)) is None
    pool.offer(kept[7,], b"before", (7, 7, 7))
    assert pool.find(b"before", (7, 7)) == (kept[7,], 2)


def test_of_blocks_that_begin_alike_the_longest_is_kept() -> None:
    pool = BlockPool(3, 32)
    blocks = [pool.take() for _ in range(3)]
    for block, tokens in zip(blocks, ((1, 2), (1, 2, 3), (1, 2, 3)), strict=True):
        assert block is not None
        pool.offer(block, b"", tokens)
        pool.release([block])
    assert (pool.num_kept, pool.num_available) == (2, 3)
    # The others' place is free, what is kept goes last.
    assert pool.take() == blocks[2]
    assert pool.find(b"", (1, 2, 3)) == (blocks[1], 3)
    # What was looked at is not the longest unused.
    assert pool.take() == blocks[0]
    assert pool.find(b"", (1, 2, 3)) == (blocks[1], 3)
    assert pool.take() == blocks[1]
    assert pool.find(b"", (1, 2, 3)) is None


def test_the_digest_depends_on_everything_before() -> None:
    one, other = chain_digest(b"", [1, 2]), chain_digest(b"", [1, 3])
    assert one == chain_digest(b"", (1, 2))
    assert len({one, other, chain_digest(one, [1, 2]), chain_digest(other, [1, 2])}) == 4


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["take", "publish", "share", "release"]), st.integers(0, 7)), max_size=80))
def test_books_always_balance(actions: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(5, 32), []
    content: dict[int, Any] = {}
    for action, number in actions:
        if action == "take":
            block = pool.take()
            assert (block is None) == (len(set(held)) == 5)
            if block is not None:
                assert block not in held
                content.pop(block, None)
                held.append(block)
        elif action == "publish" and held:
            block, digest = held[number % len(held)], bytes([number])
            if digest not in content.values() and block not in content:
                content[block] = digest
            pool.publish(block, digest)
        elif action == "share":
            block = pool.share(bytes([number]))
            if block is not None:
                assert content[block] == bytes([number])
                held.append(block)
            else:
                assert all(content.get(b) != bytes([number]) for b in held)
        elif action == "release" and held:
            pool.release([held.pop(number % len(held))])
        assert pool.num_held == len(set(held))
        assert pool.num_held + pool.num_available == 5


def test_releasing_more_than_is_held_cannot_pass_unseen() -> None:
    pool = BlockPool(2, 32)
    block = pool.take()
    assert block is not None
    pool.release([block])
    with pytest.raises(AssertionError):
        pool.release([block])
