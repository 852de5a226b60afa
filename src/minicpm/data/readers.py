"""Rows out of files: text, JSON lines, JSON arrays and Parquet, compressed or not; each row with where it stands.

What this leaves out: which files (`sources`), and what a row means (`sources` for text, `row_formats` for the rest).
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from minicpm.errors import DataError

COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts"),
    *(
        ".go",
        ".rs",
        ".rb",
        ".sh",
        ".sql",
        ".html",
        ".css",
        ".r",
        ".jl",
        ".lua",
        ".php",
        ".cs",
        ".kt",
        ".swift",
        ".scala",
    ),
)
# A line that separates the documents of one text file, as in several public corpora.
SEPARATOR = "<|endoftext|>"
# A text file longer than this is several documents, cut at an empty line: no one holds a gigabyte to encode it.
_MAX_TEXT_CHARACTERS = 1 << 24
_MAX_JSON_BYTES = 1 << 30
_PARQUET_ROWS = 1 << 12


class Row(NamedTuple):
    """One row: its fields, and the file and line where a person finds it."""

    value: dict[str, Any]
    where: str


def kind_of(path: Path) -> str | None:
    """Return the suffix of what is inside `path` (`.jsonl` of `a.jsonl.gz`), or None if no reader knows it."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    suffix = Path(name).suffix
    return suffix if suffix in ROW_SUFFIXES or suffix in TEXT_SUFFIXES else None


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one file; a text file gives rows with the single field `text`.

    Raises:
        DataError: the file cannot be read, is damaged, or a row is no JSON object; names file and line.
    """
    kind = kind_of(path)
    if kind is None:
        known = ", ".join((*ROW_SUFFIXES, ".txt", ".py", "…"))
        raise DataError(f"{path} is of no known kind; {known} are read, also with {', '.join(COMPRESSIONS)}")
    if kind == ".parquet":
        yield from _read_parquet(path)
    elif kind == ".json":
        yield from _read_json(path)
    elif kind in (".jsonl", ".ndjson"):
        yield from _read_json_lines(path)
    else:
        for number, text in _read_text(path):
            yield Row({"text": text}, f"{path}:{number}")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end) of a text file.

    Raises:
        DataError: the file cannot be read, is damaged or is not UTF-8; names file and line.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 text: {error.reason}; convert the file first") from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: the compressed file is damaged or cut off: {error}") from error
    except OSError as error:
        # bz2 has no error of its own for what is no bz2.
        if error.errno is None:
            raise DataError(f"{path}:{number + 1}: the compressed file is damaged or cut off: {error}") from error
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        # zstandard's own error type is only known where zstandard is installed.
        if type(error).__name__ != "ZstdError":
            raise
        raise DataError(f"{path}:{number + 1}: the compressed file is damaged or cut off: {error}") from error


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        # Buffered: its own way of cutting lines is written in Python.
        return cast("IO[bytes]", io.BufferedReader(gzip.GzipFile(path, "rb"), 1 << 18))
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"reading {path} needs zstandard; run `pip install 'minicpm[data]'`") from error
        # The default stops after the first of several frames, which is how some tools append.
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
        return cast("IO[bytes]", io.BufferedReader(cast("io.RawIOBase", reader), 1 << 18))
    return path.open("rb")


def _read_json_lines(path: Path) -> Iterator[Row]:
    for number, line in numbered_lines(path):
        if not line or line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{where}: not valid JSON: {reason}; each line must be one JSON object") from error
        yield Row(_as_object(value, where), where)


def _read_json(path: Path) -> Iterator[Row]:
    text, total = [], 0
    for _, line in numbered_lines(path):
        text.append(line)
        total += len(line)
        if total > _MAX_JSON_BYTES:
            raise DataError(f"{path} has more than {_MAX_JSON_BYTES} characters of JSON; write it as JSON lines")
    try:
        values = json.loads("".join(text))
    except (ValueError, RecursionError) as error:
        at = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{at}: not valid JSON: {getattr(error, 'msg', error)}; an array is expected") from error
    if not isinstance(values, list):
        raise DataError(f"{path} holds a JSON {type(values).__name__}; an array of rows is expected")
    for index, value in enumerate(values):
        where = f"{path}[{index}]"
        yield Row(_as_object(value, where), where)


def _as_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: the row is a JSON {type(value).__name__}; an object with fields is expected")
    return value


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow; run `pip install 'minicpm[data]'`") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for value in batch.to_pylist():
                    yield Row(value, f"{path}[{number}]")
                    number += 1
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}[{number}]: not a whole Parquet file: {error}") from error


def _read_text(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line of its start, text) of each document of a text file."""
    first, lines, size = 1, list[str](), 0
    for number, line in numbered_lines(path):
        is_separator = line.strip() == SEPARATOR
        if is_separator or (size > _MAX_TEXT_CHARACTERS and not line.strip()):
            yield first, "".join(lines)
            first, lines, size = number + 1, [], 0
        else:
            lines.append(line[:-2] + "\n" if line.endswith("\r\n") else line)
            size += len(line)
    yield first, "".join(lines)
