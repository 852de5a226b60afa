"""Speculation: guess the next tokens of a reply, compute them in one step, keep those that the model would have chosen.

What comes out is the same as without: each token is chosen from the model's own logits by the sequence's own random
numbers, and a draft only says which rows of the next steps to compute already now. So a seed gives the same text with
drafts and without, whatever the clock says about their length.
Left out: choosing and comparing the tokens (`engine.py`), where drafts come from (`speculation_ngram.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Items
from dataclasses import dataclass

from minicpm.engine.scheduler import Chunk
from minicpm.engine.sequence import Sequence
from minicpm.engine.speculation_ngram import Trust

# Drafts of one sequence in one step; beyond so many rows a step of any kernel takes as long per row.
LONGEST_DRAFT = 24
# Drafts less likely than this are not worth weighing.
_LEAST_CHANCE = 0.02


class StepTimes:
    """How long a step of so many rows takes, from the steps that were run."""

    # The share of a new time in the average, and after how many steps a time is forgotten.
    _SHARE, _MEMORY = 0.25, 512

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._last_seen: dict[int, int] = {}
        self._sizes: list[int] = []
        self._num_steps = 0

    def observe(self, num_rows: int, seconds: float) -> None:
        """Count one step."""
        self._num_steps += 1
        known = self._seconds.get(num_rows, seconds)
        # A step that lost the processor for a while says little.
        bounded = min(max(seconds, known / 2), known * 2)
        self._seconds[num_rows] = known + self._SHARE * (bounded - known)
        self._last_seen[num_rows] = self._num_steps
        for size in [n for n, step in self._last_seen.items() if self._num_steps - step > self._MEMORY]:
            del self._seconds[size], self._last_seen[size]
        self._sizes = sorted(self._seconds)

    def predict(self, num_rows: int) -> float | None:
        """Return the seconds of a step of `num_rows`: between two known sizes on the line through them.

        None where nothing is known: below the smallest size, and beyond twice the largest.
        """
        sizes = self._sizes
        at = bisect_left(sizes, num_rows)
        if at < len(sizes) and sizes[at] == num_rows:
            return self._seconds[num_rows]
        if at == 0 or len(sizes) < 2 or num_rows > 2 * sizes[-1]:
            return None
        low, high = (sizes[at - 1], sizes[at]) if at < len(sizes) else (sizes[-2], sizes[-1])
        start, slope = self._seconds[low], (self._seconds[high] - self._seconds[low]) / (high - low)
        return start + max(slope, 0.0) * (num_rows - low)


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may follow, and how likely each is right together with those before it."""

    sequence: Sequence
    tokens: Items[int]
    chances: Items[float]


def allot(proposals: Items[Proposal], num_rows: int, room: int, times: StepTimes) -> list[int]:
    """Return how many tokens of each proposal make the most of a step's time.

    A step without drafts does `num_rows` tokens of work, prompts included; a draft adds its chance to the work and a
    row to the step.

    Args:
        proposals: chances fall within each.
        num_rows: of the step without them.
        room: the most drafts of all together.
        times: what steps take.
    """
    counts, best_counts = [0] * len(proposals), [0] * len(proposals)
    seconds = times.predict(num_rows)
    if seconds is None:
        return counts
    best_rate = num_rows / seconds
    work = float(num_rows)
    ranked = sorted(((-chance, i) for i, p in enumerate(proposals) for chance in p.chances), key=lambda pair: pair[0])
    for place, (minus_chance, i) in enumerate(ranked[:room], 1):
        seconds = times.predict(num_rows + place)
        if seconds is None or -minus_chance < _LEAST_CHANCE:
            break
        counts[i] += 1
        work -= minus_chance
        if work / seconds > best_rate:
            best_rate, best_counts = work / seconds, counts.copy()
    return best_counts


class Speculator:
    """Drafts for the steps of one engine."""

    def __init__(self, max_rows: int) -> None:
        """Start knowing nothing of this machine.

        Args:
            max_rows: drafts of one step.
        """
        self.times = StepTimes()
        self.num_drafted_tokens = self.num_accepted_tokens = 0
        self._max_rows = max_rows
        self._trust = Trust()

    def draft(self, chunks: Items[Chunk]) -> list[Chunk]:
        """Return `chunks`, those of generating sequences with the drafts that pay."""
        proposals = [
            self._propose(chunk.sequence)
            for chunk in chunks
            if chunk.sequence.request.speculate == "ngram" and chunk.num_tokens == chunk.sequence.num_pending == 1
        ]
        proposals = [proposal for proposal in proposals if proposal.tokens]
        if not proposals:
            return list(chunks)
        num_rows = sum(chunk.num_tokens for chunk in chunks)
        scored = sum(chunk.num_tokens for chunk in chunks if chunk.sequence.reads_every_row)
        counts = allot(proposals, num_rows, self._max_rows - scored, self.times)
        drafts = {p.sequence: tuple(p.tokens[:count]) for p, count in zip(proposals, counts, strict=True)}
        return [Chunk(c.sequence, c.num_tokens, drafts.get(c.sequence, ())) for c in chunks]

    def count(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Note how a draft of `sequence` came out."""
        sequence.num_drafted_tokens += num_drafted
        sequence.num_accepted_tokens += num_accepted
        self.num_drafted_tokens += num_drafted
        self.num_accepted_tokens += num_accepted

    def _propose(self, sequence: Sequence) -> Proposal:
        ids, lookup = sequence.token_ids, sequence.lookup
        lookup.read(ids, sequence.num_prompt_tokens, self._trust)
        room = min(LONGEST_DRAFT, sequence.num_left - 1)
        return Proposal(sequence, *lookup.draft(ids, room, self._trust))
