"""Corpora → cleaner corpora, and a report of why each row went.

In this order: Unicode NFC and newlines made one kind; rules of quality; language; decontamination; exact copies; near
copies, within and across corpora (the earlier corpus keeps its row). Two passes: the first looks at each document alone
and writes what passes, the second leaves out near copies. Memory holds about 450 bytes a document, never their texts.
What this leaves out: corpora too large for that; several machines.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minicpm.data.atomic import new_folder, write_json
from minicpm.data.contamination import EvaluationIndex
from minicpm.data.language import LANGUAGES, detect_language
from minicpm.data.minhash import NUM_BANDS, NUM_MINIMA, Sketch, find_copies, sketch
from minicpm.data.processes import map_in_order
from minicpm.data.quality import QualityConfig, find_fault
from minicpm.data.sources import CLEANING_REPORT, Document, read_documents
from minicpm.data.words import hash_words
from minicpm.errors import ConfigError, DataError

_BATCH_CHARACTERS = 1 << 20
_EXAMPLES = 3
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CleanConfig:
    r"""What goes.

    Attributes:
        field: the field of a row that holds its text, or a template such as "{en}\n{zh}".
        quality: see `QualityConfig`.
        languages: those that stay; empty keeps all.
        near: Jaccard similarity from which documents are copies; 0 keeps near copies.
        ngram: words of a run that must not occur in an evaluation set.
        workers: processes.
    """

    field: str = "text"
    quality: QualityConfig = dataclasses.field(default_factory=QualityConfig)
    languages: tuple[str, ...] = ()
    near: float = 0.7
    ngram: int = 13
    workers: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.languages if name not in LANGUAGES]
        if unknown:
            raise ConfigError(f"language {unknown[0]!r} is not told apart; there are {', '.join(LANGUAGES)}")
        if not 0 <= self.near <= 1:
            raise ConfigError(f"near must lie between 0 and 1, got {self.near}")
        if self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}")


class Verdict(NamedTuple):
    """What one look at a document says: its clean text, or why it goes (with the evaluation set it was found in)."""

    text: str
    where: str
    fault: str | None
    detail: str = ""
    digest: bytes = b""
    sketch: Sketch | None = None


def clean(
    sources: Mapping[str, str],
    out: Path,
    config: CleanConfig | None = None,
    evaluation: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write each source as `NAME.jsonl.gz` to folder `out`, with `cleaning-report.json`, and return the report.

    Args:
        sources: name → what to read; of copies, the one in the earlier source stays.
        out: a new folder.
        config: see `CleanConfig`.
        evaluation: files of evaluation sets that must not occur.
        on_progress: called now and then with rows read and rows kept.

    Raises:
        DataError: a source cannot be read, nothing is left of it all, or `out` exists; nothing is left behind.
        ConfigError: a name that is no file name.
    """
    config = config or CleanConfig()
    bad = [name for name in sources if not re.fullmatch(r"[\w.-]+", name) or name.startswith(".")]
    if bad:
        raise ConfigError(f"{bad[0]!r} cannot name a corpus; use letters, digits, '-', '_' and '.'")
    index = EvaluationIndex.build(evaluation, config.ngram) if evaluation else None
    with new_folder(out) as folder:
        first = _FirstPass(folder, config, index)
        for name, source in sources.items():
            first.read(name, source, on_progress)
        copies = first.find_copies()
        _write_survivors(folder, first, copies)
        report = first.report(copies, index)
        if not report["num_kept"]:
            reasons = ", ".join(f"{count} {fault}" for fault, count in report["dropped"].items())
            raise DataError(f"nothing is left of {', '.join(sources.values())}: {reasons or 'there is no text'}")
        write_json(folder / CLEANING_REPORT, report)
    return report


def normalise(text: str) -> str:
    """Return `text` in NFC, with a line feed as its only line end and without byte order marks or NUL."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").replace("\x00", "")
    return unicodedata.normalize("NFC", text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))


class _FirstPass:
    def __init__(self, folder: Path, config: CleanConfig, index: EvaluationIndex | None) -> None:
        self._folder, self._config, self._index = folder, config, index
        self._seen: set[bytes] = set()
        # Bytes, not arrays: an array costs a hundred bytes beside what it holds.
        self._bands, self._minima = bytearray(), bytearray()
        self.sources: dict[str, dict[str, Any]] = {}
        self.num_read = self.num_passed = 0

    def read(self, name: str, source: str, on_progress: Progress | None) -> None:
        dropped: Counter[str] = Counter()
        contaminated: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        first, num_read, bytes_read = self.num_passed, 0, 0
        parts = _batches(read_documents(source, self._config.field))
        begin_with = (self._config, self._index)
        with (self._folder / f"{name}.passed").open("w", encoding="utf-8") as file:
            for verdicts in map_in_order(_look_at_part, parts, self._config.workers, _begin_process, begin_with):
                for verdict in verdicts:
                    num_read += 1
                    bytes_read += len(verdict.text.encode())
                    fault = verdict.fault
                    if fault is None and verdict.digest in self._seen:
                        fault = "exact-copy"
                    if fault is not None:
                        dropped[fault] += 1
                        contaminated.update([verdict.detail] if verdict.detail else [])
                        if len(examples.setdefault(fault, [])) < _EXAMPLES:
                            examples[fault].append(verdict.where)
                        continue
                    self._seen.add(verdict.digest)
                    if verdict.sketch is not None:
                        self._bands += verdict.sketch.bands.tobytes()
                        self._minima += verdict.sketch.minima.tobytes()
                    self.num_passed += 1
                    file.write(json.dumps({"text": verdict.text, "where": verdict.where}, ensure_ascii=False) + "\n")
                if on_progress is not None:
                    on_progress(self.num_read + num_read, self.num_passed)
        self.num_read += num_read
        self.sources[name] = {
            "source": source,
            "num_rows": num_read,
            "text_bytes": bytes_read,
            "first": first,
            "last": self.num_passed,
            "dropped": dropped,
            "examples": examples,
            "contaminated_by": contaminated,
        }

    def find_copies(self) -> NDArray[np.int64]:
        if not self._bands:
            return np.arange(self.num_passed)
        bands = np.frombuffer(self._bands, np.uint64).reshape(-1, NUM_BANDS)
        minima = np.frombuffer(self._minima, np.uint8).reshape(-1, NUM_MINIMA)
        return find_copies(bands, minima, self._config.near)

    def report(self, copies: NDArray[np.int64], index: EvaluationIndex | None) -> dict[str, Any]:
        total: Counter[str] = Counter()
        sources = {}
        for name, facts in self.sources.items():
            first, last = facts.pop("first"), facts.pop("last")
            own = copies[first:last]
            is_copy = own != np.arange(first, last)
            within, across = int((is_copy & (own >= first)).sum()), int((own < first).sum())
            facts["dropped"].update({k: v for k, v in (("near-copy", within), ("near-copy-of-other", across)) if v})
            total.update(facts["dropped"])
            facts["num_kept"] = int((~is_copy).sum())
            facts["dropped"] = dict(facts["dropped"].most_common())
            facts["contaminated_by"] = dict(facts["contaminated_by"].most_common())
            sources[name] = facts
        return {
            "num_rows": self.num_read,
            "num_kept": sum(facts["num_kept"] for facts in sources.values()),
            "dropped": dict(total.most_common()),
            "sources": sources,
            "evaluation": None
            if index is None
            else {"names": list(index.names), "ngram": index.size, "num_ngrams": len(index.hashes),
                  "num_texts_too_short": index.num_short},
        }  # fmt: skip


def _write_survivors(folder: Path, first: _FirstPass, copies: NDArray[np.int64]) -> None:
    for name, facts in first.sources.items():
        passed = folder / f"{name}.passed"
        with ExitStack() as stack:
            lines = stack.enter_context(passed.open("rb"))
            raw = stack.enter_context((folder / f"{name}.jsonl.gz").open("wb"))
            # Without a name and a time in its head, equal rows make an equal file.
            packed = stack.enter_context(gzip.GzipFile("", "wb", 3, raw, mtime=0))
            for number, line in enumerate(lines, start=facts["first"]):
                if copies[number] == number:
                    packed.write(line)
        passed.unlink()


# ------------------------------------------------------------------ processes

_settings: tuple[CleanConfig, EvaluationIndex | None] | None = None


def _begin_process(config: CleanConfig, index: EvaluationIndex | None) -> None:
    global _settings
    _settings = (config, index)


def _look_at_part(part: list[Document]) -> list[Verdict]:
    assert _settings is not None
    return [look_at(document, *_settings) for document in part]


def look_at(document: Document, config: CleanConfig, index: EvaluationIndex | None = None) -> Verdict:
    """Return what one document alone says about itself."""
    text = normalise(document.text)
    words = hash_words(text)
    fault = find_fault(text, words, config.quality)
    if fault is None and config.languages:
        language = detect_language(text)
        fault = None if language in config.languages else f"language-{language}"
    if fault is not None:
        return Verdict(text, document.where, fault)
    found = index.find(words) if index is not None else None
    if found is not None:
        return Verdict(text, document.where, "contaminated", found)
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
    return Verdict(text, document.where, None, "", digest, sketch(words) if config.near else None)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
