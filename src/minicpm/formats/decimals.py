"""`shortest_decimal`: the number that someone wrote before a file rounded it or kept only a quotient of it."""

from __future__ import annotations

import math
from collections.abc import Callable


def shortest_decimal(value: float, fits: Callable[[float], bool], max_digits: int = 15) -> float:
    """Return the decimal with the fewest digits near `value` for which `fits` holds, else `value`."""
    if math.isfinite(value):
        for digits in range(1, max_digits + 1):
            candidate = float(f"{value:.{digits}g}")
            if fits(candidate):
                return candidate
    return value
