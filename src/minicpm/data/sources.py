"""Names of corpora → documents: files, folders, globs, `stdlib:`, and the data sets of the hub.

    path/to/file.jsonl.xz      folder/      "corpus/*.parquet"
    stdlib:   stdlib:sources   stdlib:docs
    hf:owner/name   hf:owner/name@revision:config#split   (needs `datasets`; a folder of `save_to_disk` needs no prefix)

What this leaves out: formats (`readers`), cleaning, and rows of conversations (`rows`).
"""

from __future__ import annotations

import glob
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minicpm.data.readers import COMPRESSIONS, ROW_SUFFIXES, Row, kind_of, read_rows
from minicpm.data.stdlib_text import read_documentation, read_sources, stdlib_files
from minicpm.errors import DataError

# Files that our own verbs put beside text.
CLEANING_REPORT = "cleaning-report.json"
_HUB = re.compile(r"hf:(?P<path>[^@:#]+)(@(?P<revision>[^:#]+))?(:(?P<name>[^#]+))?(#(?P<split>.+))?")
_STDLIB = {"stdlib:": "both", "stdlib:sources": "sources", "stdlib:docs": "docs"}


class Document(NamedTuple):
    """A text, and the file and line where a person finds it."""

    text: str
    where: str


def read_documents(source: str, field: str = "text") -> Iterator[Document]:
    """Yield the documents of one source; those without text are left out.

    Args:
        source: see the module.
        field: the field of a row that holds its text, or a template such as "{en} = {zh}".

    Raises:
        DataError: the source does not exist or cannot be read, or a row lacks the field; names file, line and field.
    """
    if source.startswith("stdlib:"):
        yield from _read_stdlib(source)
        return
    for row in read_source_rows(source):
        text = text_of(row, field)
        if text and not text.isspace():
            yield Document(text, row.where)


def read_source_rows(source: str) -> Iterator[Row]:
    """Yield the rows of one source.

    Raises:
        DataError: the source does not exist or cannot be read; names file and line.
    """
    if source.startswith("stdlib:"):
        for document in _read_stdlib(source):
            yield Row({"text": document.text}, document.where)
    elif source.startswith("hf:") or _is_saved_dataset(Path(source)):
        yield from _read_dataset(source)
    else:
        for file in find_files(source):
            yield from read_rows(file)


def text_of(row: Row, field: str) -> str:
    """Return the text of a row: one field, or a template's fields put together.

    Raises:
        DataError: a field is missing or is no text; names file, line and field.
    """
    if "{" not in field:
        return _field(row, field)
    return re.sub(r"{([^{}]+)}", lambda match: _field(row, match[1]), field)


def find_files(source: str) -> list[Path]:
    """Return the files that a path, folder or glob names, in order of names.

    Raises:
        DataError: there is none, or none that a reader knows.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    is_folder = path.is_dir()
    if is_folder:
        found = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    files = sorted(file for file in found if kind_of(file) is not None)
    if files:
        return files
    if found:
        raise DataError(f"{source} holds no file that can be read; {', '.join(ROW_SUFFIXES)} and text are, also "
                        f"with {', '.join(COMPRESSIONS)}")  # fmt: skip
    state = "is an empty folder" if is_folder else "does not exist" if not _is_pattern(source) else "matches no file"
    raise DataError(f"{source} {state}; name a file, folder, glob, stdlib: or hf:…")


def stamp(sources: Iterable[str]) -> str:
    """Return a hash of which files the sources are, how large and how old: changes when text changes, read at once."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source}\0".encode())
        if source.startswith("hf:"):
            continue
        if source.startswith("stdlib:"):
            digest.update(sys.version.encode())
            files: Iterable[Path] = stdlib_files()
        else:
            files = sorted(Path(source).rglob("*")) if _is_saved_dataset(Path(source)) else find_files(source)
        for file in files:
            facts = file.stat()
            digest.update(f"{file.name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _read_stdlib(source: str) -> Iterator[Document]:
    if source not in _STDLIB:
        raise DataError(f"unknown source {source!r}; there are {', '.join(_STDLIB)}")
    kind = _STDLIB[source]
    if kind != "docs":
        yield from (Document(*pair) for pair in read_sources())
    if kind != "sources":
        yield from (Document(*pair) for pair in read_documentation())


def _field(row: Row, field: str) -> str:
    value: Any = row.value
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            there = ", ".join(map(repr, list(row.value)[:12])) or "no fields"
            raise DataError(f"{row.where}: field {field!r} is missing; the row has {there}; choose one of them")
        value = value[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{row.where}: field {field!r} is {type(value).__name__}, expected text")
    return value


def _is_hidden(relative: Path) -> bool:
    return relative.name == CLEANING_REPORT or any(part.startswith(".") for part in relative.parts)


def _is_pattern(source: str) -> bool:
    return any(character in source for character in "*?[")


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def _read_dataset(source: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"reading {source} needs datasets; run `pip install 'minicpm[data]'`") from error
    try:
        if source.startswith("hf:"):
            match = _HUB.fullmatch(source)
            if match is None:
                raise DataError(f"{source!r} is not of the form hf:owner/name@revision:config#split")
            wanted = match.groupdict()
            wanted["split"] = wanted["split"] or "train"
            # Streaming: a corpus may be larger than the disk. Code of the repository is never run.
            rows = datasets.load_dataset(**wanted, streaming=True)
        else:
            rows = datasets.load_from_disk(source)
        for index, value in enumerate(rows):
            yield Row(value, f"{source}[{index}]")
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot read {source}: {' '.join(str(error).split())[:300]}") from error
