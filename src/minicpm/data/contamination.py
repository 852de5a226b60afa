"""Whether a document holds text of an evaluation set: a shared run of 13 words (Chinese: characters).

What this leaves out: translations and paraphrases, and questions shorter than the run, which are counted.

Source: Brown et al. (GPT-3, arXiv 2005.14165) appendix C: 13-gram overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpm.data.readers import COMPRESSIONS, kind_of, numbered_lines
from minicpm.data.sources import find_files, read_source_rows
from minicpm.data.words import hash_ngrams, hash_words
from minicpm.errors import ConfigError, DataError

_TABLES = (".tsv", ".csv")


@dataclass(frozen=True)
class EvaluationIndex:
    """The runs of words of evaluation sets.

    Attributes:
        size: words of a run.
        names: the evaluation sets.
        hashes: sorted, uint64.
        owners: index into `names` for each hash, uint16.
        num_short: texts that were shorter than a run.
    """

    size: int
    names: tuple[str, ...]
    hashes: NDArray[np.uint64]
    owners: NDArray[np.uint16]
    num_short: int

    @classmethod
    def build(cls, sources: Sequence[str], size: int = 13) -> EvaluationIndex:
        """Return the index of all texts in all fields of `sources`.

        Raises:
            DataError: a source cannot be read, or none has a text that is long enough.
            ConfigError: `size` is too small to mean anything.
        """
        if size < 5:
            raise ConfigError(f"a run of {size} words is found everywhere; use at least 5 (13 is usual)")
        names, hashes, owners, num_short = list[str](), list[NDArray[np.uint64]](), list[NDArray[np.uint16]](), 0
        for source in sources:
            for name, texts in _texts_by_file(source):
                for text in texts:
                    words = hash_words(text)
                    if len(words) < size:
                        num_short += 1
                        continue
                    if not names or names[-1] != name:
                        names.append(name)
                    found = np.unique(hash_ngrams(words, size))
                    hashes.append(found)
                    owners.append(np.full(len(found), len(names) - 1, np.uint16))
        if not hashes:
            raise DataError(f"{', '.join(sources)}: no text of {size} words to compare with")
        merged, first = np.unique(np.concatenate(hashes), return_index=True)
        return cls(size, tuple(names), merged, np.concatenate(owners)[first], num_short)

    def find(self, words: NDArray[np.uint64]) -> str | None:
        """Return the evaluation set that a document with these words shares a run with, or None."""
        ngrams = hash_ngrams(words, self.size)
        places = np.minimum(np.searchsorted(self.hashes, ngrams), len(self.hashes) - 1)
        hits = np.flatnonzero(self.hashes[places] == ngrams)
        return self.names[int(self.owners[places[hits[0]]])] if len(hits) else None


def _texts_by_file(source: str) -> Iterator[tuple[str, Iterator[str]]]:
    if source.startswith(("hf:", "stdlib:")):
        yield source, (text for row in read_source_rows(source) for text in _strings(row.value))
        return
    path = Path(source)
    tables = [file for file in sorted(path.rglob("*")) if _suffix(file) in _TABLES] if path.is_dir() else []
    for file in tables if tables and not _has_rows(path) else [*find_files(source), *tables]:
        if _suffix(file) in (*_TABLES, ".txt"):
            yield file.name, (line for _, line in numbered_lines(file))
        else:
            yield file.name, (text for row in read_source_rows(str(file)) for text in _strings(row.value))


def _has_rows(folder: Path) -> bool:
    return any(kind_of(file) is not None for file in folder.rglob("*"))


def _suffix(file: Path) -> str:
    name = file.name
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
