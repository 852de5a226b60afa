"""Merge rules from scores, held to their definition, written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm import _native
from minicpm.tokenizer.merges import merges_from_scores, scores_from_merges
from minicpm.tokenizer.vocabulary import TokenType

# One byte, two bytes and four bytes a character in Python's texts, so that all their forms meet.
PIECES = st.lists(st.text("abé▁😀", max_size=5), max_size=40, unique=True)
HIDDEN = {TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE}


@given(st.data())
def test_every_cut_into_two_pieces_best_score_first(data: st.DataObject) -> None:
    pieces = data.draw(PIECES)
    size = len(pieces)
    types = data.draw(st.lists(st.sampled_from(list(TokenType)), min_size=size, max_size=size))
    scores = data.draw(st.lists(st.sampled_from([0.0, -1.0, -2.5]), min_size=size, max_size=size))
    ids = {piece: i for i, piece in enumerate(pieces) if types[i] not in HIDDEN}
    cuts = [
        (-scores[i], i, ids[piece[:at]], ids[piece[at:]])
        for piece, i in ids.items()
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    expected = [(pieces[left], pieces[right]) for _, _, left, right in sorted(cuts)]
    assert merges_from_scores(pieces, types, scores) == expected


def test_scores_of_merges_rank_them_by_first_mention() -> None:
    pieces = ["a", "b", "ab", "aba"]
    scores = scores_from_merges(pieces, [("ab", "a"), ("a", "b"), ("a", "ba")])
    assert scores == [0.0, 0.0, -1.0, 0.0]


def test_halves_are_the_texts_that_were_given() -> None:
    pieces = ["ab", "a", "b"]
    ((left, right),) = _native.find_merges(pieces, [0], b"\1\1\1")
    assert left is pieces[1]
    assert right is pieces[2]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], [1], b"\1"), ValueError, "does not exist"),
        ((["a"], [-1], b"\1"), ValueError, "does not exist"),
        ((["a"], [0], b""), ValueError, "one byte for each"),
        (([1], [0], b"\1"), TypeError, "texts"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _native.find_merges(*arguments)
