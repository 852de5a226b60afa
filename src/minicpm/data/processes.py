"""A function over many parts, on several processes, results in order: the same whatever the number of processes.

What this leaves out: threads, and functions that are not defined at the top of a module.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

A = TypeVar("A")
R = TypeVar("R")

_AHEAD = 2


def map_in_order(
    function: Callable[[A], R],
    parts: Iterable[A],
    workers: int,
    begin: Callable[..., None],
    begin_with: tuple[Any, ...],
) -> Iterator[R]:
    """Yield `function(part)` for each part.

    Args:
        function: defined at the top of a module.
        parts: taken only a few ahead of what is yielded, so that memory stays small.
        workers: processes; 1 runs everything here.
        begin: called once in every process before its first part, also defined at the top of a module.
        begin_with: its arguments.
    """
    if workers == 1:
        begin(*begin_with)
        yield from map(function, parts)
        return
    # Spawned, not forked: a fork copies the locks of the threads that `tokenizers` runs, held or not.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=begin, initargs=begin_with) as pool:
        pending: deque[Future[R]] = deque()
        try:
            for part in parts:
                pending.append(pool.submit(function, part))
                if len(pending) > _AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
