"""Traced text is a `str`, and trust follows the characters.

The oracle is the alphabet: trusted pieces are made of capitals, untrusted ones of small letters, and both use spaces
and commas. So after any operation a capital must be (at most) trusted and a small letter never.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm.tokenizer.provenance import TracedText, join_texts, spans_of, trust

TRUSTED = st.text("AB, ", max_size=6).map(trust)
UNTRUSTED = st.text("ab, ", max_size=6)
TRACED = st.lists(TRUSTED | UNTRUSTED, max_size=5).map(join_texts)

# Name, arguments, and whether trust must survive wherever a capital survives.
CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("strip", ()),
    ("strip", ("Aa ",)),
    ("lstrip", (" ",)),
    ("rstrip", ("b,",)),
    ("split", ()),
    ("split", (",",)),
    ("split", (",", 1)),
    ("rsplit", (",", 1)),
    ("rsplit", (None, 1)),
    ("splitlines", ()),
    ("partition", (",",)),
    ("rpartition", (",",)),
    ("replace", (",", "b")),
    ("replace", ("a", trust("B"), 1)),
    ("removeprefix", ("A",)),
    ("removesuffix", (" ",)),
    ("__getitem__", (slice(1, -1),)),
    ("__getitem__", (slice(None, 3),)),
    ("__add__", ("b",)),
    ("__add__", (trust("B"),)),
    ("__radd__", ("b",)),
    ("__mul__", (2,)),
    ("join", (["a", trust("B"), "b"],)),
]


def check(text: str, *, complete: bool = True) -> None:
    spans = spans_of(text)
    assert list(spans) == sorted(spans)
    assert all(0 <= start < stop <= len(text) for start, stop in spans)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans)), "spans are disjoint and joined"
    trusted = {i for start, stop in spans for i in range(start, stop)}
    for i, character in enumerate(str.__str__(text)):
        assert not (character in "ab" and i in trusted), f"{text!r}: {character!r} at {i} is trusted"
        assert not (complete and character in "AB" and i not in trusted), f"{text!r}: {character!r} at {i} lost trust"


@given(text=TRACED)
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize(("name", "args"), CALLS, ids=lambda v: str(v))
def test_operations_equal_those_of_str_and_carry_trust(name: str, args: tuple[Any, ...], text: TracedText) -> None:
    plain = str.__str__(text)
    expected = args[0] + plain if name == "__radd__" else getattr(plain, name)(*args)
    result = getattr(text, name)(*args)
    assert result == expected
    for part in result if isinstance(result, (list, tuple)) else [result]:
        check(part)


@given(text=TRACED)
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("name", ["swapcase", "casefold", "zfill", "center", "expandtabs"])
def test_other_operations_lose_trust(name: str, text: TracedText) -> None:
    result = getattr(text, name)(*([9] if name in ("zfill", "center") else []))
    assert spans_of(result) == () or result is text


@given(text=TRACED, at=st.integers(-9, 9))
@settings(max_examples=100, deadline=None)
def test_single_characters(text: TracedText, at: int) -> None:
    plain = str.__str__(text)
    if -len(plain) <= at < len(plain):
        assert text[at] == plain[at]
        check(text[at])
    else:
        with pytest.raises(IndexError):
            text[at]


@pytest.mark.parametrize("name", ["lower", "upper", "capitalize", "title"])
def test_case_keeps_trust_unless_characters_move(name: str) -> None:
    text = join_texts([trust("xY"), "zz"])
    assert getattr(text, name)() == getattr("xYzz", name)()
    assert spans_of(getattr(text, name)()) == ((0, 2),)
    assert spans_of(join_texts(["ß", trust("a")]).upper()) == ()


def test_it_is_a_str_to_everyone_else() -> None:
    text = join_texts([trust("ab"), "cd"])
    assert text == "abcd"
    assert hash(text) == hash("abcd")
    assert {"abcd": 1}[text] == 1
    assert "bc" in text
    assert "x" + text == "xabcd"
    assert spans_of("x" + text) == ((1, 3),)
    assert spans_of(str(text)) == ((0, 2),)
    assert type(str.__str__(text)) is str
