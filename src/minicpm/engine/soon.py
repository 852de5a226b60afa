"""A value that another thread computes meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Soon(Generic[T]):
    """A value that another thread computes meanwhile.

    A tokenizer takes as long as weights where the vocabulary is large, and both leave the interpreter to others.
    """

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._error: BaseException | None = None
        self._listener: Callable[[], None] | None = None
        self._is_there = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def tell(self, listener: Callable[[], None]) -> None:
        """Call `listener` as soon as `get` would not wait; it may be called twice."""
        self._listener = listener
        if self._is_there:
            listener()

    def get(self) -> T:
        """Wait for the value; what its computation raised is raised here."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._compute()
        except BaseException as error:
            self._error = error
        # In this order: either this thread sees the listener or `tell` sees that it is too late.
        self._is_there = True
        if self._listener is not None:
            self._listener()
