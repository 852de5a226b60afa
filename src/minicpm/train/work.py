"""What distinguishes pretraining, supervised and preference tuning: their batches and their loss, nothing else.

What this leaves out: the loop that uses them, and the data that they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from minicpm.model.minicpm import MiniCPM

B = TypeVar("B")


@dataclass
class LossParts:
    """The loss of one micro-batch.

    Attributes:
        total: what is differentiated: the summed loss times the factor that the loop gave.
        sums: named sums, such as each source's, with the number of items in each; the loop reports their quotients.
    """

    total: Tensor
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Work(Generic[B]):
    """One kind of training.

    Attributes:
        batches: the micro-batches of a step that this process computes: a pure function of the step.
        weight: what a micro-batch counts for in the mean, such as its target tokens; 0 is allowed.
        loss: (model, batch, factor) → the parts; factor is 1 over the weight of the whole global batch.
        tokens: the tokens that a micro-batch runs through the model.
        identify: what to write into a dump so that a person finds the batch again.
        stage: the name that records and checkpoints have instead of the schedule's stage; empty leaves them.
    """

    batches: Callable[[int], Sequence[B]]
    weight: Callable[[B], float]
    loss: Callable[[MiniCPM, B, float], LossParts]
    tokens: Callable[[B], int]
    identify: Callable[[B], Any]
    stage: str = ""


def add_sums(into: dict[str, tuple[float, float]], more: dict[str, tuple[float, float]]) -> None:
    """Add `more` to `into`, name by name."""
    for name, (value, count) in more.items():
        before = into.get(name, (0.0, 0.0))
        into[name] = (before[0] + value, before[1] + count)
