"""Turns an engine's steps into answers for those who wait, in one thread or several."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator

from minicpm.engine.completion import Completion, describe
from minicpm.engine.engine import Engine, Event
from minicpm.engine.sequence import Request, Sequence
from minicpm.errors import EngineError


class Runner:
    """Whoever waits for a sequence runs the steps, for all others too. Safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._lock = threading.Lock()
        self._inboxes: dict[Sequence, deque[Event]] = {}

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            EngineError: it was closed.
        """
        if self._engine is None:
            raise EngineError("the model is closed; load it again")
        return self._engine

    def start(self, request: Request) -> Sequence:
        """Add `request` and keep its events for `next_event`."""
        sequence = self.engine.add(request)
        self._inboxes[sequence] = deque()
        return sequence

    def next_event(self, sequence: Sequence) -> Event | None:
        """Return the next event of a started `sequence`; None after its last."""
        while True:
            with self.engine.shield, self._lock:
                inbox = self._inboxes.get(sequence)
                if inbox:
                    return inbox.popleft()
                if inbox is None or sequence.is_finished:
                    self._inboxes.pop(sequence, None)
                    return None
                self._step()

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

    def close(self) -> None:
        """End everything and let the engine go."""
        with self._lock:
            for sequence in list(self._inboxes):
                self.cancel(sequence)
            self._engine = None

    def _finish(self, sequence: Sequence) -> None:
        while not sequence.is_finished:
            with self.engine.shield, self._lock:
                if not sequence.is_finished:
                    self._step()

    def _step(self) -> None:
        for event in self.engine.step():
            inbox = self._inboxes.get(event.sequence)
            if inbox is not None:
                inbox.append(event)


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
        if hasattr(self, "_sequence"):
            self.close()
