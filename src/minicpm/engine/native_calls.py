"""What calls into the native part share: arguments as it wants them, and its refusals as our errors."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minicpm.errors import EngineError

Ints: TypeAlias = npt.NDArray[np.int32]


class EngineErrors:
    """Turns the native part's refusals into `EngineError`."""

    def __init__(self, prefix: str = "") -> None:
        """Begin messages with `prefix`."""
        self.prefix = prefix

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | MemoryError):
            text = "not enough memory" if isinstance(error, MemoryError) else str(error)
            raise EngineError(self.prefix + text) from None


def as_ints(name: str, array: Any, num_axes: int = 1) -> Ints:
    """Return whole numbers as int32 in one piece.

    Raises:
        EngineError: other numbers, or another number of axes.
    """
    given = np.asarray(array)
    if given.ndim != num_axes or (given.size and given.dtype.kind not in "iu"):
        raise EngineError(f"{name} must be whole numbers with {num_axes} axes, got {given.dtype} {given.shape}")
    if given.size and given.dtype != np.int32 and (given.min() < -(2**31) or given.max() >= 2**31):
        raise EngineError(f"{name} has numbers that do not fit 32 bits")
    return np.ascontiguousarray(given, np.int32)
