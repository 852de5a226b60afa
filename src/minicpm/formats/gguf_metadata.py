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

from minicpm.errors import FormatError
from minicpm.formats.block_type import Bytes
from minicpm.formats.gguf_strings import Spans, decode_strings, measure_strings

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
        self.buffer = data.data
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
            spans = measure_strings(self, count, what)
            return LazyArray(self, what, type_number, count, spans=spans)
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
    spans: Spans | None = None
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
        return decode_strings(self.cursor, self.spans, self.what) if self.spans and self.count else []


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
