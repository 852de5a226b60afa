"""Text that remembers which of its characters the chat template itself wrote.

`TracedText` is a `str` to whoever reads it, so `in`, comparisons, slices and filters of a template see the real text;
beside the characters it carries the spans that are trusted: literals of the template and the names of special tokens.
Whatever operation does not know how to carry spans over returns plain, untrusted text. A mistake can therefore turn a
control token into text, never text into a control token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, SupportsIndex

Spans = tuple[tuple[int, int], ...]


def spans_of(text: str) -> Spans:
    """The trusted spans of any string."""
    return text._spans if isinstance(text, TracedText) else ()


def trust(text: str) -> TracedText:
    """`text`, trusted as a whole."""
    return TracedText(text, ((0, len(text)),) if text else ())


def join_texts(parts: Iterable[str], separator: str = "") -> TracedText:
    """The parts in a row with `separator` between them, spans carried over; touching spans become one."""
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    at = 0
    between = len(separator) > 0
    for i, part in enumerate(parts):
        for piece in (separator, part) if between and i else (part,):
            for start, stop in spans_of(piece):
                if spans and spans[-1][1] == at + start:
                    spans[-1] = (spans[-1][0], at + stop)
                else:
                    spans.append((at + start, at + stop))
            texts.append(piece)
            at += len(piece)
    return TracedText("".join(texts), tuple(spans))


class TracedText(str):
    """A `str` with trusted spans; ascending, disjoint, inside the text."""

    __slots__ = ("_spans",)

    # A leading underscore keeps the spans out of a sandboxed template's reach.
    _spans: Spans

    def __new__(cls, text: str = "", spans: Spans = ()) -> Self:
        """`text` with these spans; without them it is wholly untrusted."""
        new = super().__new__(cls, text)
        new._spans = spans
        return new

    @property
    def trusted_spans(self) -> Spans:
        """`(start, stop)` of what the template wrote."""
        return self._spans

    def __str__(self) -> str:
        # `str(text)` in a template must not lose the spans.
        return self

    def _cut(self, start: int, stop: int) -> TracedText:
        kept = ((max(a, start) - start, min(b, stop) - start) for a, b in self._spans if max(a, start) < min(b, stop))
        return TracedText(str.__getitem__(self, slice(start, stop)), tuple(kept))

    def __getitem__(self, key: SupportsIndex | slice) -> TracedText:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._cut(start, max(start, stop)) if step == 1 else TracedText(str.__getitem__(self, key))
        at = key.__index__()
        if not -len(self) <= at < len(self):
            raise IndexError("string index out of range")
        at %= len(self)
        return self._cut(at, at + 1)

    def __add__(self, other: str) -> TracedText:
        return join_texts((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> TracedText:
        return join_texts((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> TracedText:
        if not self._spans:
            return TracedText(str.__mul__(self, times))
        return join_texts([self] * times.__index__())

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> TracedText:
        return TracedText(str.__mod__(self, values))

    def strip(self, characters: str | None = None) -> TracedText:
        """As `str.strip`."""
        return self.lstrip(characters).rstrip(characters)

    def lstrip(self, characters: str | None = None) -> TracedText:
        """As `str.lstrip`."""
        return self._cut(len(self) - len(str.lstrip(self, characters)), len(self))

    def rstrip(self, characters: str | None = None) -> TracedText:
        """As `str.rstrip`."""
        return self._cut(0, len(str.rstrip(self, characters)))

    def removeprefix(self, prefix: str) -> TracedText:
        """As `str.removeprefix`."""
        return self._cut(len(prefix), len(self)) if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> TracedText:
        """As `str.removesuffix`."""
        return self._cut(0, len(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> TracedText:
        """As `str.replace`."""
        if old == "":
            return TracedText(str.replace(self, old, new, count))
        return join_texts(self._split_at(old, count.__index__()), new)

    def split(self, separator: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        """As `str.split`."""
        if separator:
            return list(self._split_at(separator, maxsplit.__index__()))
        return list(self._locate(str.split(self, separator, maxsplit)))

    def rsplit(self, separator: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        """As `str.rsplit`."""
        return list(self._locate(str.rsplit(self, separator, maxsplit), separator or ""))

    def splitlines(self, keepends: bool = False) -> list[Any]:
        """As `str.splitlines`."""
        lines = self._locate(str.splitlines(self, keepends=True))
        return list(lines) if keepends else [line._cut(0, len(str.splitlines(line)[0])) for line in lines]

    def partition(self, separator: str) -> tuple[Any, Any, Any]:
        """As `str.partition`."""
        head, found, _ = str.partition(self, separator)
        return self._thirds(len(head), len(found))

    def rpartition(self, separator: str) -> tuple[Any, Any, Any]:
        """As `str.rpartition`."""
        head, found, _ = str.rpartition(self, separator)
        return self._thirds(len(head), len(found))

    def join(self, parts: Iterable[str]) -> TracedText:
        """As `str.join`."""
        return join_texts(parts, self)

    def lower(self) -> TracedText:
        """As `str.lower`."""
        return self._mapped(str.lower)

    def upper(self) -> TracedText:
        """As `str.upper`."""
        return self._mapped(str.upper)

    def capitalize(self) -> TracedText:
        """As `str.capitalize`."""
        return self._mapped(str.capitalize)

    def title(self) -> TracedText:
        """As `str.title`."""
        return self._mapped(str.title)

    def _mapped(self, change: Callable[[str], str]) -> TracedText:
        changed = change(self)
        # Changing case only ever lengthens text, so an equal length means that every character stayed in its place.
        return TracedText(changed, self._spans if len(changed) == len(self) else ())

    def _split_at(self, separator: str, limit: int) -> Iterator[TracedText]:
        start = 0
        while limit != 0 and (found := self.find(separator, start)) >= 0:
            yield self._cut(start, found)
            start, limit = found + len(separator), limit - 1
        yield self._cut(start, len(self))

    def _locate(self, parts: Iterable[str], separator: str = "") -> Iterator[TracedText]:
        at = 0
        for i, part in enumerate(parts):
            # With a separator the place is exact; without one only whitespace lies between.
            at = at + len(separator) if separator and i else self.find(part, at)
            yield self._cut(at, at + len(part))
            at += len(part)

    def _thirds(self, head: int, found: int) -> tuple[TracedText, TracedText, TracedText]:
        return self._cut(0, head), self._cut(head, head + found), self._cut(head + found, len(self))
