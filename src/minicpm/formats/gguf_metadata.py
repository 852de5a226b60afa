"""The metadata of a GGUF file: every length is checked before anything is allocated, arrays are decoded when asked for.

Scalars are read at once. An array is only measured: its items become Python objects when its key is looked up, so that
a vocabulary of 120,000 strings costs nothing to whoever does not need it. What this leaves out: what any key means.

Source: the GGUF specification (ggml `docs/gguf.md`), versions 2 and 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minicpm.errors import FormatError
from minicpm.formats.block_type import Bytes

STRING, ARRAY = 8, 9
# Type number -> (name, numpy dtype of one item, little endian).
SCALAR_TYPES: Mapping[int, tuple[str, str]] = {
    0: ("UINT8", "<u1"),
    1: ("INT8", "<i1"),
    2: ("UINT16", "<u2"),
    3: ("INT16", "<i2"),
    4: ("UINT32", "<u4"),
    5: ("INT32", "<i4"),
    6: ("FLOAT32", "<f4"),
    7: ("BOOL", "?"),
    10: ("UINT64", "<u8"),
    11: ("INT64", "<i8"),
    12: ("FLOAT64", "<f8"),
}
_SCALAR_BYTES = {number: np.dtype(dtype).itemsize for number, (_, dtype) in SCALAR_TYPES.items()}

# Far above any real file, low enough that reading a hostile one ends at once.
MAX_KEYS = 1 << 16
MAX_NESTED_ARRAYS = 1 << 12
MAX_DEPTH = 4
MAX_ITEMS = 1 << 22

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """A position in a file's bytes that only moves over what is there.

    Raises:
        FormatError: from every method, naming the file and the offset, before anything is allocated.
    """

    def __init__(self, data: Bytes, name: str, position: int = 0) -> None:
        self.data = data
        self.buffer = memoryview(data)  # type: ignore[arg-type]  # numpy's stubs do not show the buffer protocol
        self.name = name
        self.position = position
        self.nested_arrays = 0
        self.items = 0

    def fail(self, message: str, at: int | None = None) -> FormatError:
        """Return an error that names the file and the offset (by default the current one)."""
        return FormatError(f"{self.name}: at byte {self.position if at is None else at}: {message}")

    def take(self, num_bytes: int, what: str) -> int:
        """Move over `num_bytes` and return where they start."""
        start = self.position
        left = len(self.buffer) - start
        if num_bytes > left:
            raise self.fail(f"truncated: {what} takes {num_bytes} bytes, the file has {left} left")
        self.position = start + num_bytes
        return start

    def u32(self, what: str) -> int:
        """Read an unsigned 32-bit number."""
        return int(_U32.unpack_from(self.buffer, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        """Read an unsigned 64-bit number."""
        return int(_U64.unpack_from(self.buffer, self.take(8, what))[0])

    def string(self, what: str, max_bytes: int | None = None) -> str:
        """Read a length and so many bytes of UTF-8."""
        at = self.position
        length = self.u64(f"the length of {what}")
        if max_bytes is not None and length > max_bytes:
            raise self.fail(f"{what} claims {length} bytes; at most {max_bytes} are allowed", at)
        start = self.take(length, what)
        try:
            return str(self.buffer[start : self.position], "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not valid UTF-8", start) from None

    def printable(self, what: str, max_bytes: int) -> str:
        """Read a text that may stand in a one-line message: not empty and without control characters."""
        at = self.position
        text = self.string(what, max_bytes)
        if not text.isprintable() or not text:
            raise self.fail(f"{what} is {text[:80]!r}; printable characters are accepted", at)
        return text

    def scalar(self, type_number: int, what: str) -> Any:
        """Read one number or truth value."""
        start = self.take(_SCALAR_BYTES[type_number], what)
        if type_number == 7 and self.buffer[start] > 1:
            raise self.fail(f"{what} is a truth value of {self.buffer[start]}; 0 or 1 is accepted", start)
        return np.frombuffer(self.buffer, SCALAR_TYPES[type_number][1], 1, start)[0].item()

    def value(self, what: str) -> Any:
        """Read a type and a value of it; an array comes back as a `LazyArray`."""
        at = self.position
        type_number = self.u32(f"the type of {what}")
        if type_number == STRING:
            return self.string(what)
        if type_number == ARRAY:
            return self.array(what, 1)
        if type_number not in SCALAR_TYPES:
            raise self.fail(f"{what} has the value type {type_number}; GGUF knows 0 to 12", at)
        return self.scalar(type_number, what)

    def array(self, what: str, depth: int) -> LazyArray:
        """Measure an array without making its items."""
        at = self.position
        type_number = self.u32(f"the item type of {what}")
        count = self.u64(f"the item count of {what}")
        if type_number not in SCALAR_TYPES and type_number not in (STRING, ARRAY):
            raise self.fail(f"{what} has items of type {type_number}; GGUF knows 0 to 12", at)
        smallest = {STRING: 8, ARRAY: 12}.get(type_number) or _SCALAR_BYTES[type_number]
        left = len(self.buffer) - self.position
        if count * smallest > left:
            raise self.fail(f"{what} claims {count} items of at least {smallest} bytes; {left} bytes are left", at)
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.fail(f"with {what} the arrays have {self.items} items; at most {MAX_ITEMS} are supported", at)
        if type_number == STRING:
            starts, ends = measure_strings(self, count, what)
            return LazyArray(self, what, type_number, count, starts=starts, ends=ends)
        if type_number == ARRAY:
            return self._nested(what, count, depth)
        start = self.take(count * smallest, what)
        if type_number == 7 and count and self.data[start : self.position].max() > 1:
            raise self.fail(f"{what} holds truth values other than 0 and 1", start)
        return LazyArray(self, what, type_number, count, start=start)

    def _nested(self, what: str, count: int, depth: int) -> LazyArray:
        if depth >= MAX_DEPTH:
            raise self.fail(f"{what} nests arrays deeper than {MAX_DEPTH}")
        self.nested_arrays += count
        if self.nested_arrays > MAX_NESTED_ARRAYS:
            raise self.fail(f"{what} has more than {MAX_NESTED_ARRAYS} nested arrays")
        items = tuple(self.array(f"item {i} of {what}", depth + 1) for i in range(count))
        return LazyArray(self, what, ARRAY, count, items=items)


@dataclass(frozen=True, slots=True)
class LazyArray:
    """Where an array's items lie; `decode` makes them."""

    cursor: Cursor
    what: str
    type_number: int
    count: int
    start: int = 0
    starts: npt.NDArray[np.int64] | None = None
    ends: npt.NDArray[np.int64] | None = None
    items: tuple[LazyArray, ...] = ()

    def decode(self) -> list[Any]:
        """Return the items as Python objects.

        Raises:
            FormatError: a string is not UTF-8.
        """
        if self.type_number == ARRAY:
            return [item.decode() for item in self.items]
        if self.type_number != STRING:
            dtype = SCALAR_TYPES[self.type_number][1]
            return np.frombuffer(self.cursor.buffer, dtype, self.count, self.start).tolist() if self.count else []
        if self.starts is None or self.ends is None or not self.count:
            return []
        first = int(self.starts[0])
        text = bytes(self.cursor.buffer[first : int(self.ends[-1])])
        spans = zip((self.starts - first).tolist(), (self.ends - first).tolist(), strict=True)
        items: list[str] = []
        try:
            items.extend(text[start:end].decode() for start, end in spans)
        except UnicodeDecodeError as error:
            at = int(self.starts[len(items)])
            raise self.cursor.fail(f"a string of {self.what} is not valid UTF-8: {error.object[:40]!r}", at) from None
        return items


def measure_strings(cursor: Cursor, count: int, what: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the starts and ends, int64 (count,), of the strings of an array, and move the cursor behind them.

    Raises:
        FormatError: a length that the file cannot hold.
    """
    spans = _guess_strings(cursor, count) or _walk_strings(cursor, count, what)
    if count:
        cursor.position = int(spans[1][-1])
    return spans


def _guess_strings(cursor: Cursor, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
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


def _walk_strings(cursor: Cursor, count: int, what: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    starts, ends = np.empty(count, np.int64), np.empty(count, np.int64)
    unpack, buffer, position, size = _U64.unpack_from, cursor.buffer, cursor.position, len(cursor.buffer)
    for i in range(count):
        length = unpack(buffer, position)[0] if position + 8 <= size else size
        if length > size - position - 8:
            raise cursor.fail(f"truncated: string {i} of {what} does not end within the file", position)
        starts[i] = position + 8
        position += 8 + length
        ends[i] = position
    return starts, ends


class Metadata(Mapping[str, Any]):
    """A GGUF file's keys and values; an array becomes a list when first looked up. Safe to share among threads."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, LazyArray):
            # Two threads may both decode; they get equal lists and one of them stays.
            value = self._values[key] = value.decode()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def count(self, key: str) -> int:
        """Return how many items the array under `key` has, without decoding it; 0 for a missing key or a scalar."""
        value = self._values.get(key)
        return value.count if isinstance(value, LazyArray) else len(value) if isinstance(value, list) else 0


def read_metadata(cursor: Cursor, num_keys: int) -> Metadata:
    """Read `num_keys` pairs at the cursor.

    Raises:
        FormatError: naming the offset.
    """
    left = len(cursor.buffer) - cursor.position
    if num_keys > MAX_KEYS or num_keys * 13 > left:
        raise cursor.fail(
            f"the header claims {num_keys} metadata keys; the file has room for {min(left // 13, MAX_KEYS)}"
        )
    values: dict[str, Any] = {}
    for i in range(num_keys):
        at = cursor.position
        key = cursor.printable(f"metadata key {i}", 1 << 16)
        if key in values:
            raise cursor.fail(f"the metadata key {key!r} occurs twice", at)
        values[key] = cursor.value(repr(key))
    return Metadata(values)
