"""Cutting texts into what is read and what is scored."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minicpm.eval.windows import cut_left, encode_pair, rolling_windows


def words(text: str) -> list[int]:
    """Ids of a vocabulary in which a space belongs to the word after it."""
    import re

    return [len(piece) * 1000 + ord(piece[-1]) for piece in re.findall(r" ?[^ ]+| +", text)]


def test_the_space_belongs_to_the_continuation() -> None:
    assert encode_pair(words, [0], "a b ", "c") == (words("a b"), words(" c"))
    assert encode_pair(words, [0], "a b", " c d") == (words("a b"), words(" c d"))


def test_an_empty_context_is_the_prefix() -> None:
    assert encode_pair(words, [0], "", "a b") == ([0], words("a b"))
    assert encode_pair(lambda text: [0, *words(text)], [0], "", "a b") == ([0], words("a b"))


def test_a_long_context_loses_its_beginning() -> None:
    assert cut_left(([1, 2, 3], [4, 5]), 5) == ([1, 2, 3], [4, 5])
    assert cut_left(([1, 2, 3], [4, 5]), 4) == ([2, 3], [4, 5])
    assert cut_left(([1, 2, 3], [4, 5, 6]), 2) == ([5], [6])


@given(st.integers(0, 60), st.integers(2, 20))
def test_every_token_is_scored_once_after_what_precedes_it(num_tokens: int, limit: int) -> None:
    ids = list(range(100, 100 + num_tokens))
    windows = rolling_windows(ids, 7, limit)
    assert [i for _, scored in windows for i in scored] == ids
    whole = [7, *ids]
    for context, scored in windows:
        assert context
        assert len(context) + len(scored) <= limit
        start = whole.index(scored[0])
        assert whole[start - len(context) : start] == context
