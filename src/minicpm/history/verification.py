"""Is everything that the history lists there, unchanged, and plausible? Every problem found, each naming its place.

    stored      every manifest and object has the length and hash that its name and the index say
    decoded     every tensor of every step decodes to the SHA-256 of what was trained
    continuous  no step repeats another, stands in a neighbour's place, or follows other weights than it was coded
                after; no tensor is another step's or another tensor's (`continuity`)

What this leaves out: repairing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from minicpm.errors import CheckpointError
from minicpm.formats.block_type import Floats
from minicpm.history.catalogue import OBJECTS, Row, row_of
from minicpm.history.continuity import Continuity, Problem, find_broken_links, find_repeats, measure_turn
from minicpm.history.decoding import Decoder
from minicpm.history.manifest import Manifest
from minicpm.history.place import MissingFileError, Place
from minicpm.history.reading import History

_PIECE_BYTES = 8 << 20
_CACHE_BYTES = 1 << 30


def verify(
    history: History,
    *,
    is_deep: bool = True,
    steps: Collection[int] | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> list[Problem]:
    """Return all problems of a history, none of a sound one.

    Args:
        history: where.
        is_deep: whether every tensor is decoded, not only every object hashed.
        steps: only these checkpoints; None is all.
        on_progress: told what is being looked at.
    """
    rows = [row for row in history.rows if steps is None or row.step in steps]
    manifests, problems = _check_manifests(history, rows)
    on_progress(f"{len(manifests)} manifests read; hashing their objects")
    broken, found = _check_objects(history, manifests)
    problems += found
    problems += _check_files(history)
    problems += find_repeats(manifests)
    problems += find_broken_links(manifests)
    if is_deep:
        problems += _check_tensors(history, manifests, broken, on_progress)
    return sorted(problems, key=lambda problem: problem.step)


def _check_manifests(history: History, rows: Sequence[Row]) -> tuple[dict[int, Manifest], list[Problem]]:
    manifests: dict[int, Manifest] = {}
    problems = []
    for row in rows:
        try:
            text = history.place.read(row.manifest)
            manifest = history.manifest(row)
        except CheckpointError as error:
            problems.append(Problem(row.step, str(error)))
            continue
        manifests[row.step] = manifest
        expected = row_of(manifest, text, row.num_bytes)
        fields = ("step", "tokens", "stage", "lr", "losses", "is_key")
        wrong = [name for name in fields if getattr(expected, name) != getattr(row, name)]
        if wrong:
            problems.append(Problem(row.step, f"step {row.step}: the index says another {', '.join(wrong)}"))
    return manifests, problems


def _check_objects(history: History, manifests: dict[int, Manifest]) -> tuple[set[str], list[Problem]]:
    """Return the objects that are not whole, and one problem for each."""
    rows = {row.step: row for row in history.rows}
    users: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for step, manifest in manifests.items():
        for name in needed_objects(manifest, rows[step]):
            users.setdefault(name, []).append(step)
            sizes[name] = manifest.objects[name]
    problems, broken = [], set()
    for name, steps in users.items():
        reason = _examine(history.place, name, sizes[name])
        if reason:
            broken.add(name)
            problems.append(Problem(steps[0], f"object {name[:16]}… {reason}; {_list(steps)} cannot be read"))
    return broken, problems


def needed_objects(manifest: Manifest, row: Row) -> list[str]:
    """Return the objects that reading a checkpoint to its precision takes."""
    return list(dict.fromkeys(extent.object for extent in manifest.extents(row.precision == "exact")))


def _examine(place: Place, name: str, num_bytes: int) -> str:
    """Return what is wrong with an object, nothing if it is whole."""
    try:
        found = place.size(f"{OBJECTS}/{name}")
        if found != num_bytes:
            return f"is {'truncated' if found < num_bytes else 'too long'}: {found} bytes instead of {num_bytes}"
        digest = hashlib.sha256()
        for piece in read_pieces(place, name, num_bytes):
            digest.update(piece)
    except MissingFileError:
        return "is missing"
    except CheckpointError as error:
        return f"cannot be read ({error})"
    return "" if digest.hexdigest() == name else "was changed: its hash is not its name"


def read_pieces(place: Place, name: str, num_bytes: int) -> Iterator[bytes]:
    """Yield an object's content in pieces.

    Raises:
        CheckpointError: it is missing or too short.
    """
    for first in range(0, num_bytes, _PIECE_BYTES):
        yield place.read_ranges([(f"{OBJECTS}/{name}", first, min(_PIECE_BYTES, num_bytes - first))])[0]


def _check_files(history: History) -> list[Problem]:
    try:
        history.files()
    except CheckpointError as error:
        return [Problem(0, str(error))]
    return []


def _check_tensors(
    history: History, manifests: dict[int, Manifest], broken: set[str], on_progress: Callable[[str], None]
) -> list[Problem]:
    rows = {row.step: row for row in history.rows}
    decoder = Decoder(history.place, _CACHE_BYTES)
    problems: list[Problem] = []
    continuity = Continuity()
    names = list(next(iter(manifests.values())).tensors) if manifests else []
    for index, name in enumerate(names):
        on_progress(f"tensor {index + 1} of {len(names)}: {name}")
        values: list[tuple[int, Floats]] = []
        for step, manifest in manifests.items():
            entry = manifest.tensors.get(name)
            if entry is None:
                problems.append(Problem(step, f"step {step} has no {name}"))
                continue
            is_exact = rows[step].precision == "exact"
            needed = {extent.object for part in entry.parts for extent in part.extents(is_exact)}
            if needed & broken:
                continue
            try:
                weight = decoder.weight(name, entry, is_exact, f"step {step}")
            except CheckpointError as error:
                problems.append(Problem(step, str(error)))
                continue
            values = [*values[-2:], (step, weight.decode())]
            if not np.isfinite(values[-1][1]).all():
                problems.append(Problem(step, f"step {step}: {name} has values that are not finite"))
                values = []
            elif len(values) == 3 and len(entry.shape) > 1:
                (first, a), (middle, b), (last, c) = values
                continuity.add(name, (first, middle, last), measure_turn(a, b, c))
    return problems + continuity.problems()


def _list(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[:6])) + (f" … {steps[-1]}" if len(steps) > 6 else "")
    return f"step {shown}" if len(steps) == 1 else f"{len(steps)} checkpoints (steps {shown})"
