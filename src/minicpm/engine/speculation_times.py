"""`StepTimes`: what steps of a decoder take on this machine, learned while they run."""

from __future__ import annotations

from bisect import bisect_left


class StepTimes:
    """How long a step of so many rows takes, from the steps that were run."""

    # The share of a new time in the average, and after how many steps a time is forgotten.
    _SHARE, _MEMORY = 0.25, 512

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._last_seen: dict[int, int] = {}
        self._sizes: list[int] = []
        self._num_steps = 0

    def observe(self, num_rows: int, seconds: float) -> None:
        """Count one step."""
        self._num_steps += 1
        known = self._seconds.get(num_rows, seconds)
        # A step that lost the processor for a while says little.
        bounded = min(max(seconds, known / 2), known * 2)
        self._seconds[num_rows] = known + self._SHARE * (bounded - known)
        self._last_seen[num_rows] = self._num_steps
        for size in [n for n, step in self._last_seen.items() if self._num_steps - step > self._MEMORY]:
            del self._seconds[size], self._last_seen[size]
        self._sizes = sorted(self._seconds)

    def predict(self, num_rows: int) -> float | None:
        """Return the seconds of a step of `num_rows`: between two known sizes on the line through them.

        None where nothing is known: below the smallest size, and beyond twice the largest.
        """
        sizes = self._sizes
        at = bisect_left(sizes, num_rows)
        if at < len(sizes) and sizes[at] == num_rows:
            return self._seconds[num_rows]
        if at == 0 or len(sizes) < 2 or num_rows > 2 * sizes[-1]:
            return None
        low, high = (sizes[at - 1], sizes[at]) if at < len(sizes) else (sizes[-2], sizes[-1])
        start, slope = self._seconds[low], (self._seconds[high] - self._seconds[low]) / (high - low)
        return start + max(slope, 0.0) * (num_rows - low)
