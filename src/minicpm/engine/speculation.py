"""Speculation: guess the next tokens of a reply, compute them in one step, keep those that the model would have chosen.

What comes out is the same as without: each token is chosen from the model's own logits by the sequence's own random
numbers, and a draft only says which rows of the next steps to compute already now. So a seed gives the same text with
drafts and without, whatever the clock says about their length.
Left out: choosing and comparing the tokens (`engine.py`), where drafts come from (`speculation_ngram.py`,
`speculation_draft.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

from minicpm.engine.scheduler import Chunk
from minicpm.engine.sequence import Sequence, Speculation
from minicpm.engine.speculation_draft import DraftModel
from minicpm.engine.speculation_ngram import LEAST_CHANCE, Trust
from minicpm.engine.speculation_times import StepTimes

Opened: TypeAlias = Callable[[], AbstractContextManager[None]]

# Drafts of one sequence in one step; beyond so many rows a step of any kernel takes as long per row.
LONGEST_DRAFT = 24
# Drafts must promise so much more than a step without: looking them up is not in the times of steps, and chances err.
_LEAST_GAIN = 1.08


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may follow, and how likely each is right together with those before it."""

    sequence: Sequence
    tokens: Items[int]
    chances: Items[float]


def allot(proposals: Items[Proposal], num_rows: int, room: int, times: StepTimes) -> list[int]:
    """Return how many tokens of each proposal make the most of a step's time.

    A step without drafts does `num_rows` tokens of work, prompts included; a draft adds its chance to the work and a
    row to the step. Too small a gain counts as none.

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
    best_rate = _LEAST_GAIN * num_rows / seconds
    work = float(num_rows)
    ranked = sorted(((-chance, i) for i, p in enumerate(proposals) for chance in p.chances), key=lambda pair: pair[0])
    for place, (minus_chance, i) in enumerate(ranked[:room], 1):
        seconds = times.predict(num_rows + place)
        if seconds is None or -minus_chance < LEAST_CHANCE:
            break
        counts[i] += 1
        work -= minus_chance
        if work / seconds > best_rate:
            best_rate, best_counts = work / seconds, counts.copy()
    return best_counts


class Speculator:
    """Drafts for the steps of one engine."""

    def __init__(self, max_rows: int, model: DraftModel | None = None) -> None:
        """Start knowing nothing of this machine.

        Args:
            max_rows: drafts of one step.
            model: writes ahead for requests that want it, and for those that do not say.
        """
        self.times = StepTimes()
        self.model = model
        self.num_drafted_tokens = self.num_accepted_tokens = 0
        self._max_rows = max_rows
        self._trust = Trust()

    def draft(self, chunks: Items[Chunk], opened: Opened = nullcontext) -> list[Chunk]:
        """Return `chunks`, those of generating sequences with the drafts that pay.

        Args:
            chunks: of the next step.
            opened: a context for steps of the draft model, in which Ctrl-C may raise.

        Raises:
            KeyboardInterrupt: as `opened` allows; the same may be called again.
        """
        sequences = [c.sequence for c in chunks if c.num_tokens == c.sequence.num_pending == 1]
        num_rows = sum(chunk.num_tokens for chunk in chunks)
        proposals = [self._look_up(s) for s in sequences if self._source(s) == "ngram"]
        # A step that reads prompts is long; the model writes ahead in the next one.
        if self.model is not None and num_rows == len(sequences):
            written = [s for s in sequences if self._source(s) == "draft"]
            for sequence, tokens in self.model.draft(written, num_rows, self.times, opened).items():
                chances = [self.model.rate ** (i + 1) for i in range(len(tokens))]
                proposals.append(Proposal(sequence, tokens, chances))
        proposals = [proposal for proposal in proposals if proposal.tokens]
        if not proposals:
            return list(chunks)
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
        if self.model is not None and self._source(sequence) == "draft":
            self.model.count(num_drafted, num_accepted)

    def _source(self, sequence: Sequence) -> Speculation:
        return sequence.request.speculate or ("ngram" if self.model is None else "draft")

    def _look_up(self, sequence: Sequence) -> Proposal:
        ids, lookup = sequence.token_ids, sequence.lookup
        lookup.read(ids, sequence.num_prompt_tokens, self._trust)
        room = min(LONGEST_DRAFT, sequence.num_left - 1)
        return Proposal(sequence, *lookup.draft(ids, room, self._trust))
