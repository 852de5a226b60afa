"""The rows of a task: from a folder of evaluation data, or from the hub by `datasets`; with a hash of what was read.

A folder holds each task's file under the name in its TOML, compressed or not, also one folder deeper. What this leaves
out: what rows mean (`forms.py`).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm.data.readers import read_rows
from minicpm.errors import DataError, EvalError
from minicpm.eval.forms import select
from minicpm.eval.task import Task

_SUFFIXES = ("", ".gz", ".xz", ".zst", ".bz2")


@dataclass(frozen=True)
class Rows:
    """What a task is scored on.

    Attributes:
        rows: those to be scored.
        examples: those that may stand in front.
        origin: where they are from, for people.
        sha256: of the files' bytes, or of the rows where there are no files.
    """

    rows: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    origin: str
    sha256: str


def read_task(name: str, task: Task, folder: Path | None) -> Rows:
    """Return the rows of `task`.

    Args:
        name: of the task, for messages.
        task: says which file, which rows.
        folder: of evaluation data; None takes them from the hub.

    Raises:
        EvalError: they are not there.
        DataError: a file is damaged, or no row is left.
    """
    if folder is None:
        rows, examples, origin, sha256 = _from_hub(name, task)
    else:
        rows, examples, origin, sha256 = _from_folder(name, task, folder)
    if task.examples:
        examples = select(rows, task.examples)
    rows = select(rows, task.where)
    if not rows:
        raise DataError(f"{name}: {origin} has no row to score; the task wants rows where {task.where}")
    return Rows(rows, examples or rows, origin, sha256)


def _from_folder(name: str, task: Task, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str, str]:
    path = _find(name, folder, task.file)
    paths = [path]
    examples: list[dict[str, Any]] = []
    rows = list(_read(path, task.split_at))
    if task.shots_file:
        shots = _find(name, folder, task.shots_file)
        paths.append(shots)
        examples = list(_read(shots, task.split_at))
    for join in task.join:
        other = _find(name, folder, join.file)
        paths.append(other)
        by_key = {row[join.key]: row for row in _read(other, "")}
        rows = [{**row, join.name: by_key} for row in rows]
    digest = hashlib.sha256()
    for item in paths:
        digest.update(hashlib.sha256(item.read_bytes()).digest())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if len(paths) == 1 else digest.hexdigest()
    return rows, examples, str(path.name), sha256


def _find(name: str, folder: Path, file: str) -> Path:
    if not folder.is_dir():
        raise EvalError(f"--data {folder} is no folder; give the folder that holds {file}")
    bare = file
    for suffix in _SUFFIXES[1:]:
        bare = bare.removesuffix(suffix)
    for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        for suffix in _SUFFIXES:
            if (place / (bare + suffix)).is_file():
                return place / (bare + suffix)
    raise EvalError(
        f"{name}: {folder} holds no {file}; put it there, leave the task out, or leave --data out for the hub"
    )


def _read(path: Path, split_at: str) -> Iterator[dict[str, Any]]:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind in ("csv", "tsv"):
        yield from _read_table(path, "," if kind == "csv" else "\t")
        return
    for row in read_rows(path):
        if not split_at:
            yield row.value
            continue
        for part in re.split(split_at, row.value["text"]):
            if part.strip():
                yield {"text": part}


def _read_table(path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8") if path.suffix == ".gz" else path.read_text("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    lines = text.splitlines(keepends=True)
    reader = csv.DictReader(lines, delimiter=delimiter)
    for number, row in enumerate(reader, 2):
        if None in row or None in row.values():
            raise DataError(
                f"{path}, row {number}: has not the columns of the first line: {', '.join(reader.fieldnames or ())}"
            )
        yield dict(row)


def _from_hub(name: str, task: Task) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str, str]:
    hub = task.hub
    if hub is None:
        raise EvalError(f"{name} is not on the hub in a known form; give its folder by --data")
    try:
        import datasets
    except ImportError as error:
        raise EvalError(
            f"{name}: the hub is read by `datasets`; pip install 'minicpm[data]', or give --data"
        ) from error
    try:
        rows = [dict(row) for row in datasets.load_dataset(hub.path, hub.config, split=hub.split)]
        examples = []
        if hub.shots_split:
            examples = [dict(row) for row in datasets.load_dataset(hub.path, hub.config, split=hub.shots_split)]
    except Exception as error:
        # Whatever the hub's client raises, it is not ours to tell apart.
        raise EvalError(f"{name}: {hub.path} could not be had from the hub: {error}") from error
    text = json.dumps([rows, examples], sort_keys=True, default=str)
    return rows, examples, f"{hub.path} {hub.config or ''} {hub.split}", hashlib.sha256(text.encode()).hexdigest()
