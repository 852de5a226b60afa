"""`read_json`: a JSON object from a file that a stranger may have written, and `write_json`, its careful inverse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from minicpm.errors import FormatError
from minicpm.formats.atomic_file import atomic_file

MAX_BYTES = 64 << 20


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object in the file at `path`.

    Raises:
        FormatError: unreadable, too large, not JSON, or no object.
    """
    return parse_json(read_limited(path, max_bytes), str(path))


def read_limited(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of the file at `path`.

    Raises:
        FormatError: unreadable, or more than `max_bytes`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) > max_bytes:
        raise FormatError(f"{path} has more than {max_bytes} bytes, too many for such a file")
    return content


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in `text`; `where` is for messages.

    Raises:
        FormatError: not JSON, no object, a name twice in an object, or a number that JSON does not know.
    """

    def refuse(constant: str) -> NoReturn:
        raise FormatError(f"{where}: {constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise FormatError(f"{where}: the name {twice!r} occurs twice")
        return result

    try:
        value = json.loads(text.decode(), parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} must hold a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented UTF-8 JSON, atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
