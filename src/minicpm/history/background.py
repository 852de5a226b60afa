"""Writing a history beside a running training: the loop hands a copy of the weights over and goes on.

One thread codes and writes; at most one checkpoint waits for it, so that memory stays bounded and nothing is skipped:
a training that saves faster than this machine codes is held up, and is told so by `waited_seconds`. What this leaves
out: taking the copy (the training knows its tensors).
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping

from minicpm.errors import CheckpointError
from minicpm.formats.weight import Weight
from minicpm.history.manifest import Facts
from minicpm.history.store import HistoryWriter, StepExistsError

# The thread gives way to the training.
_NICENESS = 10


class BackgroundWriter:
    """Appends checkpoints in the order in which they come; a failure costs that checkpoint, never the training.

    Args:
        writer: whose history; closed by `close`.
        say: told of every checkpoint that could not be written.
    """

    def __init__(self, writer: HistoryWriter, say: Callable[[str], None]) -> None:
        self._writer = writer
        self._say = say
        self._queue: queue.Queue[tuple[Facts, Mapping[str, Weight]] | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)
        self._thread.start()
        self.waited_seconds = 0.0
        self.num_failed = 0

    def add(self, facts: Facts, weights: Mapping[str, Weight]) -> None:
        """Hand a checkpoint over; `weights` must not change any more. Waits while another one waits already."""
        start = time.perf_counter()
        self._queue.put((facts, weights))
        self.waited_seconds += time.perf_counter() - start

    def close(self) -> None:
        """Wait until everything handed over is written, and let others write."""
        self._queue.put(None)
        self._thread.join()
        self._writer.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # not every system knows threads' priorities
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (item := self._queue.get()) is not None:
            facts, weights = item
            try:
                append_or_replace(self._writer, facts, weights, self._say)
            except CheckpointError as error:
                self.num_failed += 1
                self._say(f"WARNING: step {facts.step} is not in the history: {error}. Training goes on.")


def append_or_replace(
    writer: HistoryWriter, facts: Facts, weights: Mapping[str, Weight], say: Callable[[str], None]
) -> None:
    """Append a checkpoint; where a resumed run comes to other weights than before, the later ones of before go.

    Raises:
        CheckpointError: it cannot be written, or takes the place of a published one.
    """
    try:
        writer.append(facts, weights)
    except StepExistsError:
        gone = writer.drop_after(facts.step - 1)
        say(f"step {facts.step} came out otherwise than before: {len(gone)} checkpoints from there on left the history")
        writer.append(facts, weights)
