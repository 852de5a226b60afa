"""`LazyWeights`: a mapping of HF names to weights that are made when asked for, and the check against a configuration.

A weight whose rows must be reordered is a copy; making it on demand keeps at most one such copy alive.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.formats.blocks import block_type
from minicpm.formats.weight import Weight


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """What is known of a weight before its bytes are touched, and the function that gives it.

    `make_interleaved` gives the rows of a q or k projection as a GGUF file has them (see `names.interleaved_order`),
    without the copy that `make` is; None where `make` is none.
    """

    shape: tuple[int, ...]
    block_type: str
    make: Callable[[], Weight]
    make_interleaved: Callable[[], Weight] | None = None

    @classmethod
    def of(cls, weight: Weight) -> WeightEntry:
        """Return the entry of a weight that is there already."""
        return cls(weight.shape, weight.block_type, lambda: weight)

    @property
    def num_bytes(self) -> int:
        """The bytes that the weight takes in its block type."""
        return math.prod(self.shape[:-1]) * block_type(self.block_type).row_bytes(self.shape[-1])


class LazyWeights(Mapping[str, Weight]):
    """HF names to weights, each made anew by every look-up. Safe to share among threads."""

    def __init__(self, entries: Mapping[str, WeightEntry]) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Weight:
        return self.entries[name].make()

    def interleaved(self, name: str) -> Weight | None:
        """Return a weight whose rows the file has interleaved as they are there, for those who undo it themselves."""
        entry = self.entries.get(name)
        return entry.make_interleaved() if entry is not None and entry.make_interleaved is not None else None

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def block_types(self) -> Counter[str]:
        """Return how many tensors each block type has, the commonest first."""
        return Counter(dict(Counter(entry.block_type for entry in self.entries.values()).most_common()))


def check_shapes(entries: Mapping[str, WeightEntry], config: ModelConfig, where: str) -> None:
    """Return when names and shapes are exactly those of `config`.

    Raises:
        CheckpointError: listing every missing, extra and misshapen tensor.
    """
    # A hostile configuration may claim billions of layers; the names of those would not fit the memory.
    if config.num_hidden_layers > len(entries):
        raise CheckpointError(
            f"{where}: the configuration has {config.num_hidden_layers} layers, the file {len(entries)} tensors"
        )
    expected = config.weight_shapes()
    problems = [f"{name} is missing" for name in expected if name not in entries]
    problems += [f"{name} does not belong to the model" for name in entries if name not in expected]
    for name, entry in entries.items():
        if name in expected and entry.shape != expected[name]:
            problems.append(f"{name} has shape {entry.shape}, expected {expected[name]}")
    if problems:
        raise CheckpointError(f"{where}: the tensors do not fit the configuration: {'; '.join(problems)}")
