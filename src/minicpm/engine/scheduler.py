"""Who runs in the next step, with how many tokens, in which blocks.

A step holds one token of every sequence that is generating, and pieces of prompts up to a budget of tokens. Prompts are
read in the order of their arrival, the first of each request before the second of any, but one that a step cannot
finish leaves half of the room to those behind it. When blocks run out, the sequence that arrived last gives its own
back and is computed again later; so does the last of a request that has many, when another has to wait.
Left out: running the step and reading its output (`engine.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass

from minicpm.engine.cache import BlockPool
from minicpm.engine.fair_queue import FairQueue
from minicpm.engine.sequence import Sequence
from minicpm.engine.sharing import Claims, CopyBlock, adopt, copy_part, drop_blocks
from minicpm.errors import EngineError


class QueueFullError(EngineError):
    """More waits already than the engine was told to keep; the request may be sent again later."""


@dataclass(frozen=True)
class Limits:
    """How much may run and wait at once.

    Attributes:
        max_parallel: sequences that run together.
        max_step_tokens: tokens of one step when nothing is generating.
        max_mixed_tokens: tokens of prompts in a step beside sequences that are generating, which wait for them.
        max_output_rows: rows of logits of one step beyond one per sequence; they take V × 4 bytes each.
        max_waiting: requests that may wait.
        max_waiting_tokens: tokens of all requests that wait.
    """

    max_parallel: int = 8
    max_step_tokens: int = 512
    max_mixed_tokens: int = 128
    max_output_rows: int = 512
    max_waiting: int = 1024
    max_waiting_tokens: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` tokens of a sequence, and tokens that may come after its last."""

    sequence: Sequence
    num_tokens: int
    drafts: Items[int] = ()


class Scheduler:
    """The waiting and the running sequences of one engine. Not thread-safe."""

    def __init__(self, pool: BlockPool, limits: Limits, copy_block: CopyBlock | None = None) -> None:
        """Start with nothing to do; without `copy_block` only full blocks are shared."""
        self.pool = pool
        self.limits = limits
        self.waiting = FairQueue()
        # In the order in which they began.
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._copy_block = copy_block
        self._free_slots = list(range(limits.max_parallel - 1, -1, -1))
        self._was_hidden = False

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Let `sequence` wait for its turn.

        Raises:
            QueueFullError: too many requests or tokens wait; nothing changed.
        """
        num_tokens, limits, waiting = len(sequence.token_ids), self.limits, self.waiting
        if len(waiting) >= limits.max_waiting:
            raise QueueFullError(f"{len(waiting)} requests wait already, the limit; try again later")
        if waiting and waiting.num_tokens + num_tokens > limits.max_waiting_tokens:
            raise QueueFullError(
                f"{waiting.num_tokens} tokens wait already and {num_tokens} more would pass the limit of "
                f"{limits.max_waiting_tokens}; try again later"
            )
        waiting.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget `sequence`, finished or not, and free what it holds."""
        if sequence.slot >= 0:
            self._stop(sequence)
            self.waiting.stop(sequence)
        else:
            self.waiting.remove(sequence)

    def plan(self) -> list[Chunk]:
        """Return what to compute next, with blocks for all of it; empty when there is nothing to do."""
        self._admit()
        wants_hidden = self._next_kind()
        chunks = []
        for sequence in list(self.running):
            # One that was preempted meanwhile no longer has a slot.
            is_generating = sequence.num_pending == 1 and sequence.slot >= 0 and sequence.wants_hidden == wants_hidden
            if is_generating and self._extend(sequence):
                chunks.append(Chunk(sequence, 1))
        prompts = [s for s in self.running if s.num_pending > 1 and s.wants_hidden == wants_hidden]
        return chunks + self._plan_prompts(_by_turns(prompts), is_mixed=bool(chunks))

    def grant(self, chunks: Items[Chunk]) -> list[Chunk]:
        """Return `chunks` with as many of their drafts as there is room for, without those cancelled meanwhile."""
        return [
            Chunk(chunk.sequence, chunk.num_tokens, chunk.drafts[: self._make_room(chunk.sequence, len(chunk.drafts))])
            for chunk in chunks
            if chunk.sequence.slot >= 0
        ]

    def trim(self, sequence: Sequence) -> None:
        """Give back the blocks that only drafts had needed."""
        excess = -sequence.num_blocks(len(sequence.token_ids), self.pool.block_tokens)
        if excess > 0:
            self.pool.release(sequence.blocks[-excess:])
            del sequence.blocks[-excess:]
            sequence.num_tabled = min(sequence.num_tabled, len(sequence.blocks))

    def _make_room(self, sequence: Sequence, num_drafts: int) -> int:
        """Set blocks aside for drafts and return how many have room; nobody has to make way for them."""
        size, num_tokens = self.pool.block_tokens, len(sequence.token_ids)
        while sequence.num_blocks(num_tokens + num_drafts, size) > 0 and self.pool.num_available > len(self.running):
            block = self.pool.take()
            assert block is not None, "one was available"
            sequence.blocks.append(block)
        return min(num_drafts, len(sequence.blocks) * size - num_tokens)

    def _plan_prompts(self, prompts: list[Sequence], *, is_mixed: bool) -> list[Chunk]:
        limits = self.limits
        room = min(limits.max_mixed_tokens, limits.max_step_tokens) if is_mixed else limits.max_step_tokens
        rows = limits.max_output_rows
        claims = Claims(self.pool, has_parts=self._copy_block is not None)
        chunks = []
        for place, sequence in enumerate(prompts):
            adopt(sequence, self.pool)
            if room <= 0:
                break
            if claims.concern(sequence):
                continue
            if self._copy_block is not None:
                copy_part(sequence, self.pool, self._copy_block)
            num_tokens = min(sequence.num_pending, room)
            if num_tokens < sequence.num_pending and place + 1 < len(prompts):
                num_tokens = max(1, num_tokens // 2)
            num_unread = max(0, sequence.num_read - sequence.num_computed)
            if sequence.reads_every_row:
                num_tokens = min(num_tokens, num_unread + rows)
                rows -= max(0, num_tokens - num_unread)
            if num_tokens:
                claims.add(sequence, num_tokens)
                chunks.append(Chunk(sequence, num_tokens))
                room -= num_tokens
        return chunks

    def _next_kind(self) -> bool:
        """Whether this step gives hidden states; the two kinds take turns, as one step gives one of them."""
        kinds = {sequence.wants_hidden for sequence in self.running}
        self._was_hidden = not self._was_hidden if len(kinds) == 2 else kinds == {True}
        return self._was_hidden

    def _admit(self) -> None:
        while (sequence := self.waiting.next) is not None:
            if self._free_slots and self._reserve(sequence):
                self.waiting.start(sequence)
                sequence.slot = self._free_slots.pop()
                self.running.append(sequence)
            elif (debtor := self.waiting.debtor(self.running)) is not None:
                self._preempt(debtor)
            else:
                return

    def _reserve(self, sequence: Sequence) -> bool:
        """Whether `sequence` has blocks for all of its tokens now; else it has none."""
        adopt(sequence, self.pool)
        needed = sequence.num_blocks(len(sequence.token_ids), self.pool.block_tokens)
        # Each running sequence may soon want one more block; an admission that takes it would be undone at once.
        if self.running and needed + len(self.running) > self.pool.num_available:
            drop_blocks(sequence, self.pool)
            if not sequence.num_preemptions:
                sequence.num_cached_tokens = 0
            return False
        for _ in range(needed):
            block = self.pool.take()
            assert block is not None, "one sequence alone always has room"
            sequence.blocks.append(block)
        return True

    def _extend(self, sequence: Sequence) -> bool:
        """Whether the pending token has a block now; else the sequence itself had to make room."""
        while sequence.num_blocks(len(sequence.token_ids), self.pool.block_tokens) > 0:
            block = self.pool.take()
            if block is not None:
                sequence.blocks.append(block)
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self._stop(victim)
        self.waiting.put_back(victim)

    def _stop(self, sequence: Sequence) -> None:
        drop_blocks(sequence, self.pool)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        self.running.remove(sequence)


def _by_turns(sequences: Items[Sequence]) -> list[Sequence]:
    """Return the first sequence of each owner, then the second of each, and so on."""
    seen: Counter[object] = Counter()
    places = []
    for sequence in sequences:
        places.append(seen[sequence.owner])
        seen[sequence.owner] += 1
    order = sorted(range(len(places)), key=places.__getitem__)
    return [sequences[i] for i in order]
