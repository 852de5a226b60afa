"""Drafts by a smaller model with the same vocabulary, which reads what the larger one has written and writes ahead.

It chooses with the settings and the random numbers of the sequence, so that where both models agree on the
distribution they agree on the token. It pauses where it loses time: by the measured times of both models' steps and
the share of its tokens that came true.
Left out: the larger model's step (`engine.py`), and opening files (`draft_opening.py`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minicpm.engine.batch import StepDecoder
from minicpm.engine.sampling import choose_token
from minicpm.engine.sequence import Sequence
from minicpm.engine.speculation_times import StepTimes

Floats: TypeAlias = npt.NDArray[np.float32]
# A slot, the position of the first token, and the tokens.
Rows: TypeAlias = tuple[int, int, list[int]]

_LONGEST_DRAFT = 8
# Rows of one step that reads a long text.
_STEP_ROWS = 512
# Rows of the steps by which its pace is measured before it is used.
_MEASURED_ROWS = (1, 16)
# The share of right tokens that is assumed at first, as so many observations, and when the past counts half.
_FIRST_RATE, _FIRST_WEIGHT, _MEMORY = 0.7, 8.0, 128.0
# Where drafts lose, one new sequence in so many tries again.
_RETRY_EVERY = 16


@dataclass
class _Slot:
    """What the draft model's cache holds at the place of one running sequence."""

    ids: list[int] = field(default_factory=list)
    owner: Sequence | None = None
    # Leading ids that agreed with the owner's at the last look.
    num_common: int = 0


class DraftModel:
    """A decoder with a place in its cache for each running sequence."""

    def __init__(
        self, decoder: StepDecoder, *, num_slots: int, context_length: int, vocab_size: int, block_tokens: int = 32
    ) -> None:
        """Start with an empty cache.

        Args:
            decoder: has blocks for `num_slots` contexts.
            num_slots: sequences that it follows; those in later slots of the engine get no drafts.
            context_length: the longest sequence that it follows.
            vocab_size: tokens of the tokenizer that both models share.
            block_tokens: positions per block.
        """
        num_blocks = -(-context_length // block_tokens)
        self._decoder = decoder
        self._context_length = context_length
        self._vocab_size = vocab_size
        self._tables = np.arange(num_slots * num_blocks, dtype=np.int32).reshape(num_slots, num_blocks)
        self._slots = [_Slot() for _ in range(num_slots)]
        self._times = StepTimes()
        self._hits, self._trials = _FIRST_RATE * _FIRST_WEIGHT, _FIRST_WEIGHT
        self._has_lost = False
        self._num_newcomers = 0
        self._pausing: set[Sequence] = set()

    @property
    def rate(self) -> float:
        """The share of its tokens that came true, those after a wrong one left out."""
        return self._hits / self._trials

    def count(self, num_drafted: int, num_accepted: int) -> None:
        """Note how a draft came out."""
        self._hits += num_accepted
        self._trials += min(num_accepted + 1, num_drafted)
        if self._trials > _MEMORY:
            self._hits /= 2
            self._trials /= 2

    def draft(
        self, sequences: Items[Sequence], num_rows: int, times: StepTimes, opened: Callable[[], Any]
    ) -> dict[Sequence, list[int]]:
        """Return the tokens that may come after each of `sequences`; all get the same number, or none.

        Args:
            sequences: of the next step of the larger model, each with one token to compute.
            num_rows: of that step without drafts.
            times: of the larger model's steps.
            opened: a context for the steps, in which Ctrl-C may raise.
        """
        if times.predict(num_rows) is None:
            return {}
        # Another thread may cancel a sequence meanwhile, which then has no slot; its place here stays its own.
        followed = {s: place for s in sequences if (place := self._place(s)) is not None}
        if not followed:
            return {}
        with opened():
            self._measure()
            length = self._best_length([*followed], num_rows, times)
            self._has_lost = length == 0
            if self._has_lost:
                self._pausing = {s for s in self._pausing if not s.is_finished} | set(followed)
                return {}
            return self._write_ahead(followed, length)

    def _place(self, sequence: Sequence) -> int | None:
        """Return the slot of `sequence`, or None when it gets no drafts."""
        place = sequence.slot
        if not 0 <= place < len(self._slots) or len(sequence.token_ids) + _LONGEST_DRAFT > self._context_length:
            return None
        if sequence in self._pausing or sequence.num_left < 2:
            return None
        slot = self._slots[place]
        if slot.owner is sequence:
            return place
        if self._has_lost:
            # Most newcomers go without, and one now and then finds out whether drafts still lose.
            self._num_newcomers += 1
            if self._num_newcomers % _RETRY_EVERY:
                self._pausing.add(sequence)
                return None
            self._hits, self._trials = _FIRST_RATE * _FIRST_WEIGHT, _FIRST_WEIGHT
        slot.owner, slot.num_common = sequence, 0
        return place

    def _measure(self) -> None:
        """Find out what steps take, before any text is read."""
        if self._times.predict(1) is not None:
            return
        for num_rows in _MEASURED_ROWS:
            for _ in range(2):  # the first touches memory for the first time
                begin = time.perf_counter()
                self._compute([(0, 0, [0] * num_rows)], wants_output=True)
                seconds = time.perf_counter() - begin
            self._times.observe(num_rows, seconds)

    def _best_length(self, sequences: Items[Sequence], num_rows: int, times: StepTimes) -> int:
        """How many tokens to draft for each of `sequences` so that most come out per second."""
        count = len(sequences)
        room = min(s.num_left - 1 for s in sequences)
        plain = times.predict(num_rows)
        # A round begins with what the larger model chose last, at most two tokens; then one token a step.
        first, further = self._times.predict(2 * count), self._times.predict(count)
        if plain is None or first is None or further is None:
            return 0
        best_length, best_pace = 0, num_rows / plain
        work, chance, seconds = float(num_rows), 1.0, first - further
        for length in range(1, min(_LONGEST_DRAFT, room) + 1):
            chance *= self.rate
            work += count * chance
            seconds += further
            step = times.predict(num_rows + count * length)
            if step is None:
                break
            if work / (seconds + step) > best_pace:
                best_length, best_pace = length, work / (seconds + step)
        return best_length

    def _write_ahead(self, places: Mapping[Sequence, int], length: int) -> dict[Sequence, list[int]]:
        drafts: dict[Sequence, list[int]] = {sequence: [] for sequence in places}
        generators = [_ahead(sequence) for sequence in places]
        occurrences = [copy.deepcopy(sequence.occurrences) for sequence in places]
        rows = [self._missing(sequence, place) for sequence, place in places.items()]
        for _ in range(length):
            logits = self._step(rows, wants_output=True)
            rows = []
            for sequence, row, seen, generator in zip(places, logits, occurrences, generators, strict=True):
                token = choose_token(row[: self._vocab_size], sequence.request.sampler, seen, generator)
                if seen is not None:
                    seen.add(token)
                drafts[sequence].append(token)
                rows.append((places[sequence], len(self._slots[places[sequence]].ids), [token]))
        return drafts

    def _missing(self, sequence: Sequence, place: int) -> Rows:
        """Return what of the sequence is not in the cache, at most one long step of it; what is before that is read."""
        slot, ids = self._slots[place], sequence.token_ids
        common = slot.num_common
        # The last token is always computed: its logits are wanted.
        while common < min(len(slot.ids), len(ids) - 1) and slot.ids[common] == ids[common]:
            common += 1
        del slot.ids[common:]
        slot.num_common = common
        while len(ids) - len(slot.ids) > _STEP_ROWS:
            start = len(slot.ids)
            self._step([(place, start, ids[start : start + _STEP_ROWS])], wants_output=False)
        return place, len(slot.ids), ids[len(slot.ids) :]

    def _step(self, rows: Items[Rows], *, wants_output: bool) -> Floats:
        """Compute rows and note them."""
        begin = time.perf_counter()
        out = self._compute(rows, wants_output=wants_output)
        self._times.observe(sum(len(ids) for _, _, ids in rows), time.perf_counter() - begin)
        for place, start, ids in rows:
            self._slots[place].ids[start:] = ids
        return out

    def _compute(self, rows: Items[Rows], *, wants_output: bool) -> Floats:
        """Return the logits (len(rows), V) after the last token of each."""
        ends = np.cumsum([len(ids) for _, _, ids in rows], dtype=np.int32) - 1
        return self._decoder.step(
            np.array([token for _, _, ids in rows for token in ids], np.int32),
            np.array([start + i for _, start, ids in rows for i in range(len(ids))], np.int32),
            np.array([place for place, _, ids in rows for _ in ids], np.int32),
            self._tables,
            ends if wants_output else ends[:0],
        )


def _ahead(sequence: Sequence) -> Random:
    """A generator that gives the numbers that `sequence` will draw, without drawing them."""
    if sequence.request.sampler.is_greedy:
        return sequence.generator
    generator = Random()
    generator.setstate(sequence.generator.getstate())
    return generator
