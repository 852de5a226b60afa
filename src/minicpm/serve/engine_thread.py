"""`EngineThread`: one thread that runs the engine's steps, and groups of sequences that tasks of the loop wait for.

Left out: what is asked and how it is answered (the routes).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable

from minicpm.engine import Engine, Event, Owner, Request, Sequence
from minicpm.errors import EngineError, MiniCPMError

_log = logging.getLogger("minicpm.serve")


class Group:
    """Sequences of one HTTP request, and their events in the order in which they came."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.num_open = len(sequences)
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> list[Event]:
        """Return the events that came since the last call, at least one; none after all sequences have ended.

        Raises:
            MiniCPMError: a sequence failed.
        """
        while not self._events:
            if not self.num_open:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events = list(self._events)
        self._events.clear()
        for event in events:
            if event.sequence.error is not None:
                raise event.sequence.error
        return events

    async def finish(self) -> list[Sequence]:
        """Return the sequences once all have ended.

        Raises:
            MiniCPMError: a sequence failed.
        """
        while await self.next():
            pass
        return self.sequences

    def push(self, event: Event) -> None:
        """Take an event in and wake the task that waits."""
        self._events.append(event)
        if event.finish_reason is not None:
            self.num_open -= 1
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineThread:
    """Runs `engine` in a thread of its own; everything else here belongs to the event loop's thread."""

    def __init__(self, engine: Engine, on_finish: Callable[[Sequence], None]) -> None:
        """Start nothing yet; `on_finish` is told each sequence that ended by itself."""
        self.engine = engine
        self._on_finish = on_finish
        self._groups: dict[Sequence, Group] = {}
        self._numbers = itertools.count()
        self._wake = threading.Event()
        self._is_sound = threading.Event()
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="minicpm-engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether steps are run."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin; called on the loop whose tasks will wait."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, requests: Iterable[Request], client: Hashable = None) -> Group:
        """Add all of `requests`, which `client` asks for at once, or none; clients take turns, and calls of each.

        Raises:
            EngineError: one does not fit the context.
            QueueFullError: too much waits already.
        """
        sequences: list[Sequence] = []
        owner = Owner(client, next(self._numbers))
        try:
            for request in requests:
                sequences.append(self.engine.add(request, owner))
        except MiniCPMError:
            self._abandon(sequences)
            raise
        group = Group(sequences)
        self._groups.update(dict.fromkeys(sequences, group))
        self._wake.set()
        return group

    def cancel(self, group: Group) -> None:
        """End what has not ended, before the next step; the group's task waits for nothing any more."""
        self._abandon([s for s in group.sequences if self._groups.pop(s, None) is not None])

    def close(self) -> None:
        """End the thread, after the step under way."""
        self._is_closed = True
        self._is_sound.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _abandon(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self.engine.abandon(sequence)
        self._wake.set()

    def _run(self) -> None:
        assert self._loop is not None, "start() sets it"
        while not self._is_closed:
            if not self.engine.has_work:
                self._wake.wait()
                self._wake.clear()
            try:
                events = self.engine.step()
            except Exception as error:  # whatever it is, the next request must be served
                _log.exception("a step of the engine failed")
                self._is_sound.clear()
                self._loop.call_soon_threadsafe(self._fail, error)
                self._is_sound.wait()
                continue
            if events:
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            ended = event.finish_reason is not None
            group = self._groups.pop(event.sequence, None) if ended else self._groups.get(event.sequence)
            if group is None:
                continue
            if ended:
                self._on_finish(event.sequence)
            group.push(event)

    def _fail(self, error: Exception) -> None:
        """End every sequence after a step that failed: none can tell how far its keys and values were written."""
        message = str(error) if isinstance(error, MiniCPMError) else "the engine failed"
        sequences = list(self._groups)
        self._abandon(sequences)
        for sequence in sequences:
            sequence.error = EngineError(message)
            self._groups.pop(sequence).push(Event(sequence, finish_reason="failed"))
        self._is_sound.set()
