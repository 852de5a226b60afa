"""Turns an engine's steps into answers for those who wait, in one thread or several."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator

from minicpm.engine.completion import Completion, describe
from minicpm.engine.engine import Engine
from minicpm.engine.events import Event
from minicpm.engine.sequence import Request, Sequence
from minicpm.errors import EngineError

_CLOSED = "the model is closed; load it again"


class Runner:
    """Of those who wait for a sequence one runs the steps, for the others too. Safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        # A condition and no lock alone: whoever steps would take the lock again before the others wake.
        self._stepped = threading.Condition()
        self._is_stepping = False
        self._inboxes: dict[Sequence, deque[Event]] = {}

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            EngineError: it was closed.
        """
        if self._engine is None:
            raise EngineError(_CLOSED)
        return self._engine

    def start(self, request: Request) -> Sequence:
        """Add `request` and keep its events for `next_event`."""
        sequence = self.engine.add(request)
        self._inboxes[sequence] = deque()
        return sequence

    def next_event(self, sequence: Sequence) -> Event | None:
        """Return the next event of a started `sequence`; None after its last."""
        while (inbox := self._inboxes.get(sequence)) is not None:
            if inbox:
                event = inbox.popleft()
                _raise_failure(event.sequence)
                return event
            if not self._step(sequence) and not inbox:
                self._inboxes.pop(sequence, None)
        if self._engine is None:
            raise EngineError(_CLOSED)
        return None

    def run(self, requests: Iterable[Request]) -> list[Sequence]:
        """Return the finished sequences of `requests`, in their order; those under way are cancelled on an error."""
        engine = self.engine
        window = 4 * engine.limits.max_parallel
        sequences: list[Sequence] = []
        num_done = 0
        try:
            for request in requests:
                if len(sequences) - num_done >= window:
                    self._finish(sequences[num_done])
                    num_done += 1
                sequences.append(engine.add(request))
            for sequence in sequences[num_done:]:
                self._finish(sequence)
        finally:
            for sequence in sequences[num_done:]:
                engine.cancel(sequence)
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        """End `sequence` and drop its events."""
        self._inboxes.pop(sequence, None)
        if self._engine is not None:
            self._engine.cancel(sequence)

    def abandon(self, sequence: Sequence) -> None:
        """The same, but before the next step; it never waits, so that a finalizer may call it."""
        self._inboxes.pop(sequence, None)
        if self._engine is not None:
            self._engine.abandon(sequence)

    def close(self) -> None:
        """End everything and let the engine go."""
        for sequence in list(self._inboxes):
            self.cancel(sequence)
        self._engine = None

    def _finish(self, sequence: Sequence) -> None:
        while self._step(sequence):
            pass
        _raise_failure(sequence)

    def _step(self, sequence: Sequence) -> bool:
        """Run a step, or wait while another thread runs one; False, and nothing, when `sequence` has all its events."""
        engine = self.engine
        with engine.shield:
            with self._stepped:
                if self._is_stepping:
                    with engine.shield.opened():
                        self._stepped.wait()
                    return True
                if sequence.is_finished:
                    return False
                self._is_stepping = True
            try:
                for event in engine.step():
                    inbox = self._inboxes.get(event.sequence)
                    if inbox is not None:
                        inbox.append(event)
            finally:
                with self._stepped:
                    self._is_stepping = False
                    self._stepped.notify_all()
        return True


def _raise_failure(sequence: Sequence) -> None:
    if sequence.error is not None:
        raise sequence.error


class TextStream(Iterator[str]):
    """The pieces of one reply as they become certain; `result` is what has come so far, and why it ended.

    It starts with the first `next`. Left unfinished (`close`, the end of a `with`, Ctrl-C in `next`, or forgotten), the
    reply is cancelled and its memory is free for others.
    """

    def __init__(self, runner: Runner, request: Request, messages: list[dict[str, str]]) -> None:
        self._runner = runner
        self._messages = messages
        self._sequence = runner.start(request)

    def __next__(self) -> str:
        try:
            while (event := self._runner.next_event(self._sequence)) is not None:
                if event.text:
                    return event.text
        except BaseException:
            self.close()
            raise
        raise StopIteration

    @property
    def result(self) -> Completion:
        """The reply so far; `finish_reason` is None while it goes on."""
        return describe(self._sequence)

    @property
    def token_ids(self) -> list[int]:
        """The ids of the prompt and of the reply so far."""
        return list(self._sequence.token_ids)

    @property
    def history(self) -> list[dict[str, str]]:
        """The conversation with the reply so far as its last message; a new list each time."""
        return [*(dict(message) for message in self._messages), {"role": "assistant", "content": self._sequence.text}]

    def close(self) -> None:
        """Cancel what has not finished."""
        self._runner.cancel(self._sequence)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        # It may run in the middle of a step of the same thread, where `close` would wait for ever.
        if hasattr(self, "_sequence"):
            self._runner.abandon(self._sequence)
