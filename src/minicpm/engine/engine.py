"""`Engine`: requests in, tokens out; one `step` is one run of the decoder over every sequence that is under way.

Left out: text of prompts, chat and files (`language_model.py`), and loops, threads or queues around `step`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from minicpm.architecture import ModelConfig
from minicpm.engine.batch import Batch, StepDecoder, build_batch
from minicpm.engine.cache import BlockPool
from minicpm.engine.events import Event, Load
from minicpm.engine.interrupts import InterruptShield
from minicpm.engine.outputs import Floats, choose_next, read_hidden, score_prompt
from minicpm.engine.prefixes import Prefixes
from minicpm.engine.sampling import log_softmax
from minicpm.engine.scheduler import Chunk, Limits, Scheduler
from minicpm.engine.sequence import Owner, Request, Sequence, count_new_tokens
from minicpm.engine.sharing import publish
from minicpm.engine.speculation import Speculator
from minicpm.engine.speculation_draft import DraftModel
from minicpm.engine.stopping import Ending, FinishReason
from minicpm.errors import EngineError, MiniCPMError

if TYPE_CHECKING:
    from minicpm.tokenizer import Tokenizer


class Engine:
    """Runs requests together over one decoder and one paged KV cache.

    `add`, `cancel` and `load` may be called from any thread at any time; of several threads in `step`, one runs. After
    Ctrl-C in `step` nothing of that step has happened and the engine goes on as before.
    """

    def __init__(
        self,
        decoder: StepDecoder,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_tokens: int = 32,
        context_length: int | None = None,
        limits: Limits | None = None,
        tokenizer: Tokenizer | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        """Start with nothing to do.

        Args:
            decoder: has `num_blocks` blocks of `block_tokens` positions, or more.
            config: the decoder's.
            num_blocks: blocks of the KV cache, at least those of one context.
            block_tokens: positions per block.
            context_length: the longest sequence, prompt and reply; default: what the model was trained on.
            limits: how much runs and waits at once.
            tokenizer: gives events their text; without one there is no text.
            draft: writes ahead for those requests that do not say otherwise.

        Raises:
            EngineError: the blocks do not hold one context.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        self.context_length = config.max_position_embeddings if context_length is None else context_length
        max_blocks = -(-self.context_length // block_tokens)
        if num_blocks < max_blocks:
            raise EngineError(
                f"a context of {self.context_length} tokens takes {max_blocks} blocks of {block_tokens}; "
                f"the KV cache has {num_blocks}"
            )
        # A model may have rows for tokens that its tokenizer does not: those are never chosen.
        self._vocab_size = min(config.vocab_size, tokenizer.vocab_size) if tokenizer else config.vocab_size
        # Around everything that must not be cut in two by Ctrl-C, also what a caller does with the events of a step.
        self.shield = InterruptShield()
        self._decoder = decoder
        self._scheduler = Scheduler(BlockPool(num_blocks, block_tokens), self.limits, decoder.copy_block)
        self.prefixes = Prefixes(decoder, self._scheduler.pool, self._alone)
        self._speculator = Speculator(self.limits.max_output_rows, draft)
        self._tables = np.zeros((self.limits.max_parallel, max_blocks), np.int32)
        self._events: deque[Event] = deque()
        self._abandoned: deque[Sequence] = deque()
        self._state = threading.Lock()
        self._turn = threading.Lock()
        self._num_steps = self._num_computed_tokens = 0

    # ------------------------------------------------------------------ requests

    def add(self, request: Request, owner: Owner | None = None) -> Sequence:
        """Take `request` in; its events come from later steps. Owners take turns; those without one are one owner.

        Raises:
            EngineError: it does not fit the context or the vocabulary.
            QueueFullError: too much waits already.
            ConfigError: a stop text is empty.
        """
        max_new_tokens = self.check(request)
        ending = Ending(
            self.tokenizer.stream() if self.tokenizer else None,
            end_ids=request.end_ids,
            stops=request.stop,
            max_new_tokens=max_new_tokens,
        )
        sequence = Sequence(request, owner, ending=ending, max_new_tokens=max_new_tokens, vocab_size=self._vocab_size)
        with self.shield, self._state:
            self._scheduler.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End `sequence` now, if it has not ended; no event comes of it."""
        self.abandon(sequence)
        with self.shield, self._state:
            self._drop_abandoned()

    def abandon(self, sequence: Sequence) -> None:
        """End `sequence` before the next step; unlike `cancel` it never waits, so that a finalizer may call it."""
        self._abandoned.append(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return self._scheduler.has_work

    @property
    def load(self) -> Load:
        """How busy the engine is now."""
        with self.shield, self._state:
            self._drop_abandoned()
            scheduler, pool = self._scheduler, self._scheduler.pool
            return Load(
                num_running=len(scheduler.running),
                num_waiting=len(scheduler.waiting),
                num_waiting_tokens=scheduler.waiting.num_tokens,
                num_blocks=pool.num_blocks,
                num_held_blocks=pool.num_held,
                num_kept_blocks=pool.num_kept,
                num_steps=self._num_steps,
                num_computed_tokens=self._num_computed_tokens,
                num_preemptions=scheduler.num_preemptions,
                num_drafted_tokens=self._speculator.num_drafted_tokens,
                num_accepted_tokens=self._speculator.num_accepted_tokens,
            )

    def check(self, request: Request) -> int:
        """Return how many new tokens `request` may have.

        Raises:
            EngineError: it does not fit the context or the vocabulary.
        """
        if request.speculate == "draft" and self._speculator.model is None:
            raise EngineError('speculate "draft" needs a draft model: load the model with one, or leave it out')
        return count_new_tokens(request, self.context_length, self._vocab_size)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self.shield, self._turn, self._state:
            yield

    def prepare(self) -> None:
        """Do now what opening the model left to its first steps, for those who wait for requests."""
        self._decoder.pack()

    # ------------------------------------------------------------------ steps

    def step(self) -> list[Event]:
        """Compute one step and return what it brought; empty when there is nothing to do.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step may be run again.
            EngineError: the decoder failed.
        """
        with self.shield, self._turn:
            batch = self._plan()
            if batch is not None:
                begin = time.perf_counter()
                with self.shield.opened():
                    out = self._decoder.step(
                        batch.tokens,
                        batch.positions,
                        batch.sequences,
                        self._tables,
                        batch.output_rows,
                        "hidden" if batch.wants_hidden else "logits",
                    )
                with self._state:
                    self._read(batch, out)
                if not batch.wants_hidden:
                    self._speculator.times.observe(len(batch.tokens), time.perf_counter() - begin)
        # Beyond the shield: when its end raises, the events stay for the next step.
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def _plan(self) -> Batch | None:
        with self._state:
            self._drop_abandoned()
            chunks = self._scheduler.plan()
        # Without the lock: others may add and cancel meanwhile.
        chunks = self._speculator.draft(chunks, self.shield.opened)
        with self._state:
            chunks = self._scheduler.grant(chunks)
            return self._prepare(chunks) if chunks else None

    def _prepare(self, chunks: list[Chunk]) -> Batch:
        now = time.perf_counter()
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.timings.started is None:
                sequence.timings.started = now
            done, blocks = sequence.num_tabled, sequence.blocks
            if done < len(blocks):
                self._tables[sequence.slot, done : len(blocks)] = blocks[done:]
                sequence.num_tabled = len(blocks)
        return build_batch(chunks)

    def _read(self, batch: Batch, out: Floats) -> None:
        """Bring what was computed into the books, sequence by sequence."""
        self._num_steps += 1
        self._num_computed_tokens += len(batch.tokens)
        end = 0
        for chunk, num_outputs in zip(batch.chunks, batch.num_outputs, strict=True):
            end += num_outputs
            sequence = chunk.sequence
            if sequence.slot < 0:
                continue  # cancelled while the step ran
            rows = out[end - num_outputs : end]
            is_read = chunk.num_tokens == sequence.num_pending
            if batch.wants_hidden:
                read_hidden(sequence, rows)
                if is_read:
                    self._events.append(Event(sequence, finish_reason="stop"))
                    self._finish(sequence, "stop", chunk.num_tokens)
                    continue
            elif sequence.request.prompt_logprobs is not None:
                score_prompt(sequence, rows[: len(rows) - len(chunk.drafts)], self.tokenizer)
            if is_read:
                try:
                    self._take_tokens(sequence, rows[-1 - len(chunk.drafts) :], chunk)
                except MiniCPMError as error:
                    sequence.error = error
                    self._events.append(Event(sequence, finish_reason="failed"))
                    self._finish(sequence, "failed")
            else:
                self._advance(sequence, chunk.num_tokens)

    def _take_tokens(self, sequence: Sequence, rows: Floats, chunk: Chunk) -> None:
        """Choose the next token, and more of them for as long as they are the drafted ones."""
        num_computed, num_accepted = chunk.num_tokens, 0
        for logits, draft in zip(rows, (*chunk.drafts, None), strict=True):
            self._take_token(sequence, logits, num_computed)
            if sequence.is_finished or sequence.token_ids[-1] != draft:
                break
            num_computed, num_accepted = 1, num_accepted + 1
        if chunk.drafts:
            self._speculator.count(sequence, len(chunk.drafts), num_accepted)
            self._scheduler.trim(sequence)

    def _take_token(self, sequence: Sequence, logits: Floats, num_computed: int) -> None:
        if sequence.request.wants_distribution and sequence.distribution is None:
            sequence.distribution = log_softmax(logits)
        if sequence.max_new_tokens == 0:
            self._events.append(Event(sequence, finish_reason="length"))
            self._finish(sequence, "length", num_computed)
            return
        token_id, is_complete, logprob = choose_next(sequence, logits, self._vocab_size, self.tokenizer)
        self._advance(sequence, num_computed)
        sequence.token_ids.append(token_id)
        if sequence.timings.first_token is None:
            sequence.timings.first_token = time.perf_counter()
        text, finish_reason = sequence.ending.push(token_id, is_complete=is_complete)
        sequence.pieces.append(text)
        self._events.append(Event(sequence, token_id, text, logprob, finish_reason))
        if finish_reason is not None:
            self._finish(sequence, finish_reason)

    def _advance(self, sequence: Sequence, num_tokens: int) -> None:
        sequence.num_computed += num_tokens
        publish(sequence, self._scheduler.pool)

    def _drop_abandoned(self) -> None:
        while self._abandoned:
            sequence = self._abandoned.popleft()
            if not sequence.is_finished:
                self._finish(sequence, "cancelled")

    def _finish(self, sequence: Sequence, reason: FinishReason, num_computed: int = 0) -> None:
        self._advance(sequence, num_computed)
        sequence.finish_reason = reason
        sequence.timings.finished = time.perf_counter()
        self._scheduler.remove(sequence)
