"""Ctrl-C and SIGTERM: once asks the loop to save and stop after its step, twice stops now."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """A context in which the two signals are wishes; `exit_code` is 0 until there was one, then 130 or 143."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # Handlers belong to the main thread; in any other the loop runs without.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def is_asked(self) -> bool:
        """Whether the loop should save and stop."""
        return self.exit_code != 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            # Unfinished folders are never taken for checkpoints, so leaving at once loses only steps.
            os._exit(128 + number)
        self.exit_code = 128 + number
