"""How far two checkpoints are from each other, tensor by tensor and layer by layer.

What this leaves out: what the difference does to the model's answers (`minicpm compare`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minicpm.errors import CheckpointError
from minicpm.history.reading import Snapshot

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Difference:
    """Two tensors, or two groups of them, A and B.

    Attributes:
        name: of the tensor or group.
        num_weights: values.
        norm: of A.
        change: the norm of B - A over that of A.
        cosine: between A and B.
        largest: the largest absolute difference.
    """

    name: str
    num_weights: int
    norm: float
    change: float
    cosine: float
    largest: float


@dataclass(frozen=True)
class _Sums:
    count: int
    aa: float
    bb: float
    ab: float
    dd: float
    largest: float

    def over(self, name: str) -> Difference:
        norms = (self.aa * self.bb) ** 0.5
        change = (self.dd / self.aa) ** 0.5 if self.aa else 0.0 if not self.dd else float("inf")
        cosine = self.ab / norms if norms else 1.0 if self.aa == self.bb else 0.0
        return Difference(name, self.count, self.aa**0.5, change, min(cosine, 1.0), self.largest)


def diff_tensors(a: Snapshot, b: Snapshot) -> Iterator[tuple[str, _Sums]]:
    """Yield (name, sums) of every tensor.

    Raises:
        CheckpointError: the two are of different models, or cannot be read.
    """
    if a.config.weight_shapes() != b.config.weight_shapes():
        raise CheckpointError("the two checkpoints are of models of different shape; only the same model is compared")
    for name in a:
        x, y = (s.weight(name).decode().reshape(-1).astype(np.float64) for s in (a, b))
        difference = y - x
        yield name, _Sums(
            x.size, float(x @ x), float(y @ y), float(x @ y), float(difference @ difference),
            float(np.abs(difference).max()),
        )  # fmt: skip


def by_tensor(a: Snapshot, b: Snapshot) -> list[Difference]:
    """Return the difference of every tensor, in the model's order."""
    return [sums.over(name) for name, sums in diff_tensors(a, b)]


def by_layer(a: Snapshot, b: Snapshot) -> list[Difference]:
    """Return the difference of the embedding, of every layer, of what follows, and of everything together."""
    groups: dict[str, list[_Sums]] = {}
    for name, sums in diff_tensors(a, b):
        match = _LAYER.match(name)
        group = f"layer {int(match[1])}" if match else name.removeprefix("model.").removesuffix(".weight")
        groups.setdefault(group, []).append(sums)
    everything = [sums for group in groups.values() for sums in group]
    return [_joined(group).over(name) for name, group in groups.items()] + [_joined(everything).over("all")]


def _joined(sums: Sequence[_Sums]) -> _Sums:
    return _Sums(
        sum(s.count for s in sums), sum(s.aa for s in sums), sum(s.bb for s in sums), sum(s.ab for s in sums),
        sum(s.dd for s in sums), max(s.largest for s in sums),
    )  # fmt: skip
