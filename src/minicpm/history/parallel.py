"""Work on several processors, results in order: the codec gives up the interpreter lock while it works."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def num_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[T], U], items: Iterable[T], num_threads: int = 0) -> Iterator[U]:
    """Yield `function(item)` of each item, in order; at most one item a thread is taken ahead.

    Args:
        function: what to do; must be safe to run several times at once.
        items: taken as they are needed.
        num_threads: 0 takes as many as there are processors.
    """
    count = num_threads or num_processors()
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="history") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
