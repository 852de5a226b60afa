"""The strings of a GGUF array, each behind its length: found and decoded all together where that is provably the same.

A vocabulary has 120,000 of them, and somebody waits for the first token.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from minicpm.formats.gguf_metadata import Cursor

# The starts and the ends of strings in the file, int64 (count,) each.
Spans = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]

_LENGTH = struct.Struct("<Q")


def measure_strings(cursor: Cursor, count: int, what: str) -> Spans:
    """Return the starts and ends, int64 (count,), of the strings of an array, and move the cursor behind them.

    Raises:
        FormatError: a length that the file cannot hold.
    """
    spans = _guess_strings(cursor, count) or _walk_strings(cursor, count, what)
    if count:
        cursor.position = int(spans[1][-1])
    return spans


def _guess_strings(cursor: Cursor, count: int) -> Spans | None:
    """Find the lengths as the 64-bit numbers below 256, then prove the guess; None where it does not hold.

    A length sits wherever seven zero bytes follow a byte, unless a string is empty, long or holds zero bytes. The chain
    "each length's position + 8 + length is the next one's position", true from the first on, is the definition of the
    array, so nothing is taken on trust.
    """
    begin = cursor.position
    window = cursor.data[begin : begin + 64 + 40 * count]
    if count < 64 or window.size < 8:
        return None
    numbers = np.ndarray((window.size - 7,), "<u8", buffer=window, strides=(1,))
    found = np.flatnonzero(numbers < 256)[:count].astype(np.int64)
    if len(found) < count or found[0]:
        return None
    ends = found + 8 + numbers[found].astype(np.int64)
    if (ends[:-1] != found[1:]).any() or ends[-1] > window.size:
        return None
    return found + (begin + 8), ends + begin


def _walk_strings(cursor: Cursor, count: int, what: str) -> Spans:
    starts, ends = np.empty(count, np.int64), np.empty(count, np.int64)
    unpack, buffer, position, size = _LENGTH.unpack_from, cursor.buffer, cursor.position, len(cursor.buffer)
    for i in range(count):
        length = unpack(buffer, position)[0] if position + 8 <= size else size
        if length > size - position - 8:
            raise cursor.fail(f"truncated: string {i} of {what} does not end within the file", position)
        starts[i] = position + 8
        position += 8 + length
        ends[i] = position
    return starts, ends


def decode_strings(cursor: Cursor, spans: Spans, what: str) -> list[str]:
    """Return the strings at `spans`, at least one, of the array that is called `what` in messages.

    Raises:
        FormatError: a string is not UTF-8; names its place.
    """
    return _decode_together(cursor, *spans) or _decode_one_by_one(cursor, *spans, what)


def _decode_together(cursor: Cursor, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> list[str] | None:
    """Decode one text, in which zeros stand for the lengths, and cut it there; None if that might be wrong.

    A string that holds a zero byte might, and so might text that is not UTF-8.
    """
    first = int(starts[0])
    text = cursor.data[first : int(ends[-1])].copy()
    text[((starts[1:] - first - 8)[:, None] + np.arange(8)).ravel()] = 0
    if np.count_nonzero(text) != text.size - 8 * (len(starts) - 1):
        return None
    try:
        return text.tobytes().decode().split("\0" * 8)
    except UnicodeDecodeError:
        return None


def _decode_one_by_one(
    cursor: Cursor, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], what: str
) -> list[str]:
    items: list[str] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        try:
            items.append(bytes(cursor.buffer[start:end]).decode())
        except UnicodeDecodeError as error:
            message = f"a string of {what} is not valid UTF-8: {error.object[:40]!r}"
            raise cursor.fail(message, start) from None
    return items
