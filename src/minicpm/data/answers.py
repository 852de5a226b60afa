"""Prompts with answers to compare or judge, as arrays: for preference tuning, whose rows are not packed.

Of pairs, row 2i is the better answer of pair i and row 2i + 1 the worse; of judged answers, row i is answer i. A batch
is a pure function of its place in the run: every epoch has an order of its own. What this leaves out: packing (an
answer's log-probability is one number, so each row stands alone, padded on the right), tensors, and losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from minicpm.data.batches import IGNORED
from minicpm.data.permutation import key_of, permute
from minicpm.data.row_formats import Example
from minicpm.data.rows import label, label_pair
from minicpm.errors import DataError
from minicpm.tokenizer import LabelledRow, Tokenizer


@dataclass(frozen=True)
class AnswerBatch:
    """Some answers; R rows of T tokens.

    Attributes:
        indices: int64 (R): rows of the set.
        input_ids: int64 (R, T), padded on the right.
        targets: int64 (R, T): the following id where it belongs to the answer, else -100.
        is_good: bool (R): the better answer, or the verdict.
        where: file and line of each row.
    """

    indices: NDArray[np.int64]
    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    is_good: NDArray[np.bool_]
    where: tuple[str, ...]

    @property
    def num_targets(self) -> NDArray[np.int64]:
        """Tokens of each answer, (R)."""
        return np.asarray((self.targets != IGNORED).sum(axis=1), np.int64)


@dataclass(frozen=True)
class AnswerSet:
    """All answers of a run; `num_cut` items lost an end to the length, `num_dropped` had no answer left."""

    kind: Literal["preference", "judged"]
    rows: tuple[LabelledRow, ...]
    is_good: tuple[bool, ...]
    where: tuple[str, ...]
    pad_id: int
    seed: int
    num_cut: int = 0
    num_dropped: int = 0

    @property
    def rows_per_item(self) -> int:
        """2 for pairs, 1 for judged answers."""
        return 2 if self.kind == "preference" else 1

    @property
    def num_items(self) -> int:
        """Pairs or judged answers: one epoch."""
        return len(self.rows) // self.rows_per_item

    @property
    def content_hash(self) -> str:
        """A hash of all ids, masks and verdicts."""
        digest = hashlib.sha256()
        for row, good in zip(self.rows, self.is_good, strict=True):
            digest.update(np.array([*row.ids, *row.is_trained, good], np.int64).tobytes())
        return digest.hexdigest()

    def items(self, first: int, count: int) -> NDArray[np.int64]:
        """Return which items stand at places `first` … of the endless run, each epoch in its own order."""
        places = np.arange(first, first + count, dtype=np.int64)
        epochs = places // self.num_items
        found = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            at = epochs == epoch
            key = key_of(self.seed, "answers", int(epoch))
            found[at] = permute(places[at] % self.num_items, self.num_items, key)
        return found

    def batch(self, first: int, count: int) -> AnswerBatch:
        """Return the items at places `first` … of the run; of pairs, all better answers come before all worse ones."""
        return self.take(self.items(first, count))

    def take(self, items: NDArray[np.int64]) -> AnswerBatch:
        """Return these items as a batch."""
        if self.kind == "judged":
            return self.take_rows(items)
        return self.take_rows(np.concatenate([2 * items, 2 * items + 1]))

    def take_rows(self, indices: NDArray[np.int64]) -> AnswerBatch:
        """Return these rows as a batch."""
        rows = [self.rows[index] for index in indices]
        width = max(len(row.ids) for row in rows) - 1
        ids = np.full((len(rows), width), self.pad_id, np.int64)
        targets = np.full((len(rows), width), IGNORED, np.int64)
        for number, row in enumerate(rows):
            length = len(row.ids) - 1
            ids[number, :length] = row.ids[:-1]
            targets[number, :length] = np.where(row.is_trained[1:], row.ids[1:], IGNORED)
        good = np.array([self.is_good[index] for index in indices], bool)
        return AnswerBatch(indices, ids, targets, good, tuple(self.where[index] for index in indices))

    def mismatched(self) -> AnswerSet:
        """Return each prompt with the answer of the next one: what KTO measures the drift of the model on.

        Source: KTO (arXiv 2402.01306) §4.1, the estimate of z₀; the pairing is fixed, so that the reference's
        log-probabilities can be computed once.
        """
        prompts = [row.is_trained.index(True) for row in self.rows]
        rows = []
        for index, row in enumerate(self.rows):
            other = (index + 1) % len(self.rows)
            ids = row.ids[: prompts[index]] + self.rows[other].ids[prompts[other] :]
            rows.append(LabelledRow(ids, [False] * prompts[index] + self.rows[other].is_trained[prompts[other] :]))
        return AnswerSet(self.kind, tuple(rows), self.is_good, self.where, self.pad_id, self.seed)


def build_answers(
    examples: Sequence[Example],
    kind: Literal["preference", "judged"],
    tokenizer: Tokenizer,
    sequence_length: int,
    seed: int,
) -> AnswerSet:
    """Return the labelled answers of `examples`, cut to `sequence_length` inputs.

    Raises:
        DataError: a row cannot be labelled, or no item has an answer left.
    """
    rows: list[LabelledRow] = []
    good: list[bool] = []
    where: list[str] = []
    num_cut = num_dropped = 0
    for example in examples:
        made = label_pair(tokenizer, example) if kind == "preference" else (label(tokenizer, example),)
        kept = [LabelledRow(row.ids[: sequence_length + 1], row.is_trained[: sequence_length + 1]) for row in made]
        if any(not row.num_trained for row in kept):
            num_dropped += 1
            continue
        # What remains of two answers that differ only behind the cut is the same twice.
        if len(kept) == 2 and kept[0].ids == kept[1].ids:
            num_dropped += 1
            continue
        num_cut += any(len(row.ids) < len(whole.ids) for row, whole in zip(kept, made, strict=True))
        rows += kept
        good += [True, False] if kind == "preference" else [example.is_good]
        where += [example.where] * len(kept)
    if not rows:
        raise DataError(
            f"no answer is left in rows of {sequence_length} tokens ({num_dropped} dropped); use a longer "
            "batch.sequence_length"
        )
    eos = tokenizer.vocabulary.eos_id
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else eos or 0
    return AnswerSet(kind, tuple(rows), tuple(good), tuple(where), pad, seed, num_cut, num_dropped)
