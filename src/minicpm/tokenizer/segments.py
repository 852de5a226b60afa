"""Where control tokens may be read in a text: only inside spans that the model's own template wrote.

A control token is found only if every one of its characters lies in one trusted span, so text typed by a user cannot
become one, nor complete one that the template began.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import AddedToken

Spans = Sequence[tuple[int, int]]


class Segment(NamedTuple):
    """A part of a text: plain where `token_id` is None, else one control token."""

    start: int
    stop: int
    token_id: int | None


class ControlMatcher:
    """Finds control tokens in trusted spans, the longest at each place, from left to right."""

    def __init__(self, added: Mapping[int, AddedToken]) -> None:
        """Prepare for these added tokens; those that are not special are ignored."""
        self._tokens = {token.content: (i, token) for i, token in added.items() if token.special and token.content}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def split(self, text: str, trusted: Spans) -> Iterator[Segment]:
        """Segments that cover `text` without gaps; plain ones are never empty."""
        plain_from = 0
        for start, stop, token_id in self._find(text, trusted):
            if start < plain_from:
                continue
            if start > plain_from:
                yield Segment(plain_from, start, None)
            yield Segment(start, stop, token_id)
            plain_from = stop
        if plain_from < len(text):
            yield Segment(plain_from, len(text), None)

    def _find(self, text: str, trusted: Spans) -> Iterator[Segment]:
        if self._pattern is None:
            return
        floor = 0
        for span_start, span_stop in trusted:
            for match in self._pattern.finditer(text, span_start, span_stop):
                token_id, token = self._tokens[match[0]]
                start, stop = match.span()
                if token.single_word and not _stands_alone(text, start, stop):
                    continue
                # Such tokens swallow the whitespace beside them, as their model's own tokenizer does.
                if token.lstrip:
                    start = max(floor, len(text[:start].rstrip()))
                if token.rstrip:
                    stop = len(text) - len(text[stop:].lstrip())
                floor = stop
                yield Segment(start, stop, token_id)


def _stands_alone(text: str, start: int, stop: int) -> bool:
    before = text[start - 1] if start else " "
    after = text[stop] if stop < len(text) else " "
    return not re.match(r"\w", before) and not re.match(r"\w", after)
