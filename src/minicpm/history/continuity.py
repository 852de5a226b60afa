"""Do the checkpoints follow one another? What their own hashes cannot show, made as they are from wrong weights.

    links     a step was written after the weights that stand before it now
    repeats   no step is an earlier one again, no matrix returns to what it was before it changed
    jumps     no matrix is far from both neighbours while they are near each other: another step's, another tensor's
    swaps     no two neighbours stand in each other's place

What this leaves out: hashes, decoding (`verification`).

A swap is seen by the way that it makes: of four checkpoints a, b, c, d the turn (|ac|² + |bd|² - |ab|² - |cd|²) / 2 is
|bc|² for a random walk and more for one with a direction, 0 for noise around a point, however unevenly they are spaced;
with b and c exchanged it has the opposite sign.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minicpm.formats.block_type import Floats
from minicpm.history.manifest import Manifest

# A wrong tensor is so many times further from both neighbours than they are from each other. A random walk gives 0.7,
# noise around a fixed point 1.
_JUMP = 1.5
# A turn below both: of |bc|², and of |bc| times the longest of the three ways.
_TURN, _TURN_OF_LONGEST = -0.5, -0.4


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be: `step` is the first checkpoint that suffers from it."""

    step: int
    text: str


@dataclass(frozen=True)
class Turn:
    """The ways from one checkpoint over a second to a third: their squared lengths, and their inner product."""

    before: float
    after: float
    across: float
    inner: float

    def __add__(self, other: Turn) -> Turn:
        """Return that of both tensors together."""
        return Turn(
            self.before + other.before,
            self.after + other.after,
            self.across + other.across,
            self.inner + other.inner,
        )


def measure_turn(first: Floats, middle: Floats, last: Floats) -> Turn:
    """Return the turn of one tensor."""
    before, after = (middle - first).reshape(-1), (last - middle).reshape(-1)
    there, on, inner = _dot(before, before), _dot(after, after), _dot(before, after)
    before += after  # the way from the first to the last, in place: a tensor may take a gigabyte
    return Turn(there, on, _dot(before, before), inner)


def _dot(a: Floats, b: Floats) -> float:
    return float(np.dot(a, b))


class Continuity:
    """Collects the turns of a history's matrices, and says what is wrong with them."""

    def __init__(self) -> None:
        self._jumps: dict[int, list[tuple[str, float]]] = {}
        self._turns: dict[tuple[int, int, int], Turn] = {}

    def add(self, name: str, steps: tuple[int, int, int], turn: Turn) -> None:
        """Take the turn of a matrix at the middle one of three steps that follow each other."""
        self._turns[steps] = self._turns[steps] + turn if steps in self._turns else turn
        # Neighbours that are equal are found as a repeat, by hash.
        ratio = math.sqrt(min(turn.before, turn.after) / turn.across) if turn.across else 0.0
        if ratio > _JUMP:
            self._jumps.setdefault(steps[1], []).append((name, ratio))

    def problems(self) -> list[Problem]:
        """Return the jumps and the swaps."""
        found = [
            Problem(
                step,
                f"step {step}: {list_names([name for name, _ in jumps])} jump away from both neighbours and back "
                f"({max(ratio for _, ratio in jumps):.1f} times their distance): probably of another step or another "
                "tensor",
            )
            for step, jumps in self._jumps.items()
        ]
        return found + find_swaps(self._turns)


def find_swaps(turns: Mapping[tuple[int, int, int], Turn]) -> list[Problem]:
    """Return the neighbours whose order makes the way through the run longer than the other order would.

    The two first and the two last checkpoints have no neighbour on one side and are not looked at.
    """
    problems = []
    for first, second in itertools.pairwise(sorted(turns)):
        if first[1:] != second[:2]:
            continue
        (_, b, c), left, right = first, turns[first], turns[second]
        turn = left.after + left.inner + right.inner
        longest = math.sqrt(left.after * max(left.before, left.after, right.after))
        if turn < _TURN * left.after and turn < _TURN_OF_LONGEST * longest:
            problems.append(
                Problem(b, f"steps {b} and {c} seem to stand in each other's place: the run goes there and back again")
            )
    return problems


def find_broken_links(manifests: Mapping[int, Manifest]) -> list[Problem]:
    """Return the steps that were coded after other weights than those that the step before them has now."""
    digests = {step: manifest.weights_sha256 for step, manifest in manifests.items()}
    problems = []
    for step, manifest in manifests.items():
        previous, expected = manifest.previous, manifest.previous_weights_sha256
        if previous is None or expected is None:
            continue
        if previous >= step:
            problems.append(Problem(step, f"step {step} says that it was coded after step {previous}: it was renamed"))
        elif digests.get(previous, expected) != expected:
            problems.append(
                Problem(step, f"step {step} was coded after other weights than step {previous} has: one was exchanged")
            )
    return problems


def find_repeats(manifests: Mapping[int, Manifest]) -> list[Problem]:
    """Return the steps that repeat an earlier one, and matrices that return to what they were before they changed."""
    problems = []
    seen: dict[tuple[str, ...], int] = {}
    places: dict[str, dict[str, int]] = {}
    previous: dict[str, str] = {}
    for step, manifest in manifests.items():
        whole = tuple(entry.sha256 for entry in manifest.tensors.values())
        if whole in seen:
            problems.append(Problem(step, f"step {step} repeats step {seen[whole]}: every tensor is the same"))
            continue
        seen[whole] = step
        returned: dict[int, list[str]] = {}
        for name, entry in manifest.tensors.items():
            before = places.setdefault(name, {})
            if len(entry.shape) > 1 and entry.sha256 in before and previous.get(name) != entry.sha256:
                returned.setdefault(before[entry.sha256], []).append(name)
            before.setdefault(entry.sha256, step)
            previous[name] = entry.sha256
        problems += [
            Problem(step, f"step {step}: {list_names(names)} as in step {source}, and another in between")
            for source, names in returned.items()
        ]
    return problems


def list_names(names: Sequence[str]) -> str:
    """Return a few of the names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
