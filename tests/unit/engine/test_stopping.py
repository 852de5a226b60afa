"""Where a reply ends, however its text is cut into pieces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm.engine.stopping import Ending, StopTexts
from minicpm.errors import ConfigError

LETTERS = st.text("ab<>", max_size=40)
STOPS = st.lists(st.text("ab<>", min_size=1, max_size=5), max_size=4)


def shown(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """What `StopTexts` lets pass of `pieces`."""
    watch, text = StopTexts(stops), ""
    for piece in pieces:
        part, is_stopped = watch.push(piece)
        text += part
        if is_stopped:
            return text, True
    return text + watch.finish(), False


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule, slowly: at the first character where some stop text is complete, the longest of those is cut."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(LETTERS, STOPS, st.lists(st.integers(0, 40), max_size=12))
def test_any_cut_shows_the_same_text(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert shown(pieces, stops) == expected(text, stops)
    assert shown(list(text), stops) == expected(text, stops)


@given(LETTERS, STOPS)
def test_what_is_shown_early_is_never_taken_back_and_nothing_is_held_in_vain(text: str, stops: list[str]) -> None:
    watch, so_far = StopTexts(stops), ""
    for i, character in enumerate(text):
        part, is_stopped = watch.push(character)
        so_far += part
        assert expected(text, stops)[0].startswith(so_far)
        if is_stopped:
            return
        held = text[len(so_far) : i + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


class Letters:
    """A detokenizer of one letter per id, with an unfinished character at the end."""

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def finish(self) -> str:
        return "?"


def reply(text: str, *, stops: Sequence[str] = (), limit: int = 100, end: str = "$") -> tuple[list[str], str | None]:
    ending = Ending(Letters(), end_ids={ord(end)}, stops=list(stops), max_new_tokens=limit)
    pieces = []
    for letter in text:
        piece, reason = ending.push(ord(letter))
        pieces.append(piece)
        if reason is not None:
            return pieces, reason
    return pieces, None


def test_an_end_token_has_no_text_and_frees_what_was_held() -> None:
    assert reply("ab<$cd", stops=["<end>"]) == (["a", "b", "", "<?"], "stop")


def test_the_limit_counts_tokens_and_frees_what_was_held() -> None:
    assert reply("ab<en", stops=["<end>"], limit=4) == (["a", "b", "", "<e?"], "length")


def test_a_stop_text_completed_by_the_last_token_is_a_stop() -> None:
    assert reply("ab<end>", stops=["<end>"], limit=7) == (["a", "b", "", "", "", "", ""], "stop")


def test_an_end_token_at_the_limit_is_a_stop() -> None:
    assert reply("ab$", limit=3) == (["a", "b", "?"], "stop")


def test_without_a_reason_it_goes_on() -> None:
    assert reply("abc") == (["a", "b", "c"], None)


def test_stop_texts_must_be_texts_with_something_to_find_them_in() -> None:
    with pytest.raises(ConfigError, match="not empty, got ''"):
        StopTexts(["a", ""])
    with pytest.raises(ConfigError, match="got 3"):
        StopTexts([3])
    with pytest.raises(ConfigError, match="need a tokenizer"):
        Ending(None, end_ids=frozenset(), stops=["x"], max_new_tokens=1)
