"""Ctrl-C at the right moment: a step of the engine is either done or not begun, never half written into its books.

Left out: stopping the kernels, which the decoder does itself between layers.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptShield:
    """A context in which Ctrl-C waits until the end, or until the next `opened` part.

    It only acts where Ctrl-C raises `KeyboardInterrupt` by Python's own handler, in the main thread; a program's own
    handler is left alone. It may be entered again inside itself.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._is_open = False
        self._is_pending = False

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self._depth == 0:
            if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                return
            signal.signal(signal.SIGINT, self._note)
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        if not self._depth or threading.current_thread() is not threading.main_thread():
            return
        self._depth -= 1
        if self._depth == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if error[0] is KeyboardInterrupt:
                self._is_pending = False
            self._raise_pending()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """A part of the context in which Ctrl-C raises at once."""
        is_ours = self._depth > 0 and threading.current_thread() is threading.main_thread()
        if not is_ours:
            yield
            return
        self._is_open = True
        try:
            self._raise_pending()
            yield
        finally:
            self._is_open = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_open:
            self._is_open = False
            raise KeyboardInterrupt
        self._is_pending = True

    def _raise_pending(self) -> None:
        if self._is_pending:
            self._is_pending = False
            raise KeyboardInterrupt
