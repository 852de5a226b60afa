"""Rows of tokens as arrays: a batch is a pure function of its place in the run.

`targets[b, t]` is the id that follows `input_ids[b, t]` (already shifted: compare it with the prediction made AT t), or
-100 where nothing is learned: in padding, at a document's end, and where the target is not supervised.
`document_ids` count the segments of a row from 0, -1 in padding; attention stays within equal ids. `positions` begin at
0 in every segment. What this leaves out: tensors and devices (the trainer's), and ranks: it asks for its own rows.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minicpm.data.mixture import RowOrder, Span
from minicpm.data.packing import plan_rows
from minicpm.data.shards import TokenShards
from minicpm.errors import ConfigError

IGNORED = -100


class DocumentReference(NamedTuple):
    """A segment of a batch: `row` and `column` say where it lies, the rest where it comes from."""

    row: int
    column: int
    length: int
    source: str
    document: int
    offset: int
    epoch: int


@dataclass(frozen=True)
class Batch:
    """Some rows of a run; B rows of T tokens.

    Attributes:
        first_row: the run's number of the first row.
        input_ids: int64 (B, T).
        targets: int64 (B, T), the following id or -100.
        document_ids: int32 (B, T), -1 in padding.
        positions: int32 (B, T).
        source_ids: int32 (B), index into `sources`; a row holds one source.
        sources: the run's sources.
        references: every segment, in order of rows and columns.
    """

    first_row: int
    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    document_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    source_ids: NDArray[np.int32]
    sources: tuple[str, ...]
    references: tuple[DocumentReference, ...]

    @functools.cached_property
    def num_targets(self) -> int:
        """Tokens that are learned: the weight of this batch in the global mean."""
        return int((self.targets != IGNORED).sum())

    @functools.cached_property
    def num_inputs(self) -> int:
        """Tokens that are not padding."""
        return int((self.document_ids >= 0).sum())

    def tokens_by_source(self) -> dict[str, int]:
        """Return input tokens, padding excluded, by source."""
        return self._by_source((self.document_ids >= 0).sum(axis=1))

    def targets_by_source(self) -> dict[str, int]:
        """Return target tokens by source."""
        return self._by_source((self.targets != IGNORED).sum(axis=1))

    def _by_source(self, per_row: NDArray[np.int64]) -> dict[str, int]:
        sums = np.bincount(self.source_ids, weights=per_row, minlength=len(self.sources))
        return {name: int(count) for name, count in zip(self.sources, sums, strict=True)}


class BatchStream:
    """The rows of a run, by number. Safe to share between threads."""

    def __init__(
        self, spans: Sequence[Span], shards: Mapping[str, TokenShards], sequence_length: int, *, seed: int
    ) -> None:
        """Plan the rows of every source.

        Args:
            spans: the mixture from each row on; the first begins at row 0.
            shards: by mixture name.
            sequence_length: T.
            seed: of the order within epochs.

        Raises:
            ConfigError: a span names a source that is not in `shards`.
            DataError: shards were made with different tokenizers, or hold nothing to learn.
        """
        if sequence_length < 2:
            raise ConfigError(f"sequence_length must be at least 2, got {sequence_length}")
        named = list(dict.fromkeys(name for span in spans for name in span.mixture.shares))
        plans = {name: plan_rows(shards[name], sequence_length) for name in named if name in shards}
        self.order = RowOrder(spans, plans, seed)
        self.sequence_length = sequence_length
        self._shards = [shards[name] for name in self.order.names]
        self._pad = [int(s.manifest.get("pad_id", 0)) for s in self._shards]

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources; `Batch.source_ids` index them."""
        return self.order.names

    def batch(self, first_row: int, num_rows: int) -> Batch:
        """Return rows first_row … first_row + num_rows - 1 of the run.

        The rows of a range are the rows of its parts, one after another: how a batch is dealt out to micro-batches or
        ranks does not change it.
        """
        if first_row < 0 or num_rows < 1:
            raise ConfigError(f"a batch needs a first row of at least 0 and 1 row, got {first_row} and {num_rows}")
        places = self.order.places(first_row, num_rows)
        shape = (num_rows, self.sequence_length)
        ids = np.empty(shape, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        documents = np.full(shape, -1, np.int32)
        positions = np.zeros(shape, np.int32)
        references: list[DocumentReference] = []
        for index, place in enumerate(places):
            shards, plan = self._shards[place.source], self.order.plans[place.source]
            ids[index] = self._pad[place.source]
            column = 0
            first, last = int(plan.row_bounds[place.row]), int(plan.row_bounds[place.row + 1])
            for number, segment in enumerate(range(first, last)):
                start, length = int(plan.starts[segment]), int(plan.lengths[segment])
                end = column + length
                tokens = shards.tokens(start, start + length + 1)
                ids[index, column:end] = tokens[:-1]
                targets[index, column:end] = tokens[1:]
                if shards.is_supervised:
                    targets[index, column:end][shards.supervised(start + 1, start + length + 1) == 0] = IGNORED
                documents[index, column:end] = number
                positions[index, column:end] = np.arange(length)
                document = int(np.searchsorted(shards.bounds, start, side="right")) - 1
                offset = start - int(shards.bounds[document])
                name = self.sources[place.source]
                references.append(DocumentReference(index, column, length, name, document, offset, place.epoch))
                column = end
        source_ids = np.array([place.source for place in places], np.int32)
        return Batch(first_row, ids, targets, documents, positions, source_ids, self.sources, tuple(references))

    def prefetch(self, ranges: Iterable[tuple[int, int]], workers: int = 1) -> Iterator[Batch]:
        """Yield `batch(*range)` of each range in order, made ahead by threads; 0 workers makes each when it is due.

        Threads, not processes: the work is copying out of mapped files, and the result is the same in any case.
        """
        if workers < 1:
            for first_row, num_rows in ranges:
                yield self.batch(first_row, num_rows)
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
            pending: deque[Future[Batch]] = deque()
            try:
                for first_row, num_rows in ranges:
                    pending.append(pool.submit(self.batch, first_row, num_rows))
                    if len(pending) > workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
