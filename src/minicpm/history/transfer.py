"""Copying a history, or a part of it, from anywhere to a folder or URL: resumable, every byte held to its hash.

Checkpoint by checkpoint, each listed once all that it needs is there; base layers first, so that the whole run can be
looked at early, refinements after. What is at the destination is never changed. What this leaves out: the card, and
looking at the result (`publishing`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minicpm.errors import CheckpointError
from minicpm.history.catalogue import ABOUT, INDEX, OBJECTS, Catalogue, Precision, Row, parse_catalogue
from minicpm.history.destination import Destination, FolderDestination
from minicpm.history.manifest import FOLDER, Manifest, parse_manifest
from minicpm.history.reading import History
from minicpm.history.scores import SCORES, current_scores, merged, read_scores, scores_to_json
from minicpm.history.verification import needed_objects

Report = Callable[[str, int, int], None]
# What lies beside a history at its destination, and is not looked at.
_OWN = {ABOUT, INDEX, OBJECTS, FOLDER, "README.md", SCORES}


def _silent(what: str, done_bytes: int, total_bytes: int) -> None:
    """Report nothing."""


def pull(
    source: History, path: Path, steps: Sequence[int], precision: Precision = "exact", on_progress: Report = _silent
) -> int:
    """Make the folder `path` hold the checkpoints `steps` of `source`, besides what it holds; return the bytes fetched.

    Raises:
        CheckpointError: see `copy`.
    """
    with contextlib.closing(FolderDestination(path)) as destination:
        return copy(source, destination, steps, precision, on_progress)


def copy(
    source: History,
    destination: Destination,
    steps: Sequence[int],
    precision: Precision = "exact",
    on_progress: Report = _silent,
    *,
    is_published: bool = False,
) -> int:
    """Make `destination` hold the checkpoints `steps` of `source`, besides what it holds, and return the bytes sent.

    What is there already is not sent again; an interrupted copy goes on where it stopped. A reader of the destination
    sees whole checkpoints only, at any moment.

    Args:
        source: where from.
        destination: where to.
        steps: which.
        precision: "base" leaves the refinements out.
        on_progress: told (source, bytes done, bytes in all).
        is_published: whether the checkpoints are marked as published there.

    Raises:
        CheckpointError: a step or precision that the source has not, a hash that differs, another history or foreign
            files at the destination, another checkpoint of the same step there, or no room.
    """
    wanted = [source.at(step, precision=precision).row for step in steps]
    check_own(source, destination)
    sending = _Sending(source, destination, on_progress)
    phases: tuple[Precision, ...] = ("base", "exact") if precision == "exact" else ("base",)
    plan = [
        dataclasses.replace(row, precision=phase, is_published=is_published or row.is_published)
        for phase in phases
        for row in sending.missing(wanted, phase)
    ]
    there = list(sending.same(wanted))
    sending.begin([*there, *plan])
    # What was damaged there is replaced.
    for row in there:
        sending.send_objects(row)
    for row in plan:
        sending.send(row)
        if row.precision == precision:
            destination.mark(row)
    # Also those that an interrupted call sent and did not come to mark.
    for row in wanted:
        destination.mark(row)
    _send_scores(source, destination, steps)
    return sending.done_bytes


def _send_scores(source: History, destination: Destination, steps: Sequence[int]) -> None:
    """Put what is known of the checkpoints beside what is known there."""
    there = read_scores(destination.place)
    both = merged(there, [score for score in current_scores(source) if score.step in set(steps)])
    if both != there:
        destination.write(SCORES, scores_to_json(both))


def check_own(source: History, destination: Destination) -> None:
    """Return if the destination is empty, or holds a part of the same history.

    Raises:
        CheckpointError: it holds something else; nothing was written.
    """
    names = [name for name in destination.names() if not name.startswith(".")]
    if ABOUT in names:
        if destination.place.read(ABOUT) != source.place.read(ABOUT):
            raise CheckpointError(
                f"{destination.place.name} holds another history than {source.place.name}; name another place"
            )
        return
    empty = Catalogue(source.catalogue.about_sha256, ()).to_json()
    own = _OWN if INDEX in names and destination.place.read(INDEX) == empty else _OWN - {INDEX}
    if foreign := [name for name in names if name not in own]:
        raise CheckpointError(
            f"{destination.place.name} is not empty and holds no history ({', '.join(sorted(foreign)[:3])}); name "
            "another place"
        )


@dataclass
class _Sending:
    source: History
    destination: Destination
    on_progress: Report

    def __post_init__(self) -> None:
        self.catalogue = self._read_index()
        self.sizes = self.destination.object_sizes()
        self.done_bytes = self.total_bytes = 0

    def _read_index(self) -> Catalogue:
        place = self.destination.place
        if ABOUT in self.destination.names():
            return parse_catalogue(place.read(INDEX), f"{place.name}/{INDEX}")
        return Catalogue(self.source.catalogue.about_sha256, ())

    def missing(self, rows: Sequence[Row], phase: Precision) -> Iterator[Row]:
        """Yield the rows that the destination has not, or not to this precision.

        Raises:
            CheckpointError: it has another checkpoint of the same step.
        """
        known = {row.step: row for row in self.catalogue.rows}
        for row in rows:
            there = known.get(row.step)
            if there is not None and there.manifest_sha256 != row.manifest_sha256:
                self._require_same_weights(row, there)
            if there is None or (phase == "exact" and there.precision == "base"):
                yield row

    def same(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Yield the rows of the destination's own index, as exact as they are there, that are of the same manifests."""
        known = {row.step: row for row in self.catalogue.rows}
        for row in rows:
            there = known.get(row.step)
            if there is not None and there.manifest_sha256 == row.manifest_sha256:
                yield there

    def _require_same_weights(self, row: Row, there: Row) -> None:
        """Return if two manifests, coded at different times, are of the same weights."""
        place = self.destination.place
        theirs = parse_manifest(place.read(there.manifest), f"{place.name}/{there.manifest}")
        if _hashes(theirs) != _hashes(self.source.manifest(row)):
            raise CheckpointError(
                f"{place.name} has another checkpoint of step {row.step}, with other weights; what was published "
                "stays: name another place"
            )

    def begin(self, plan: Sequence[Row]) -> None:
        """Count what is to come, check that there is room, and make the destination a history."""
        about = self.source.about
        sizes: dict[str, int] = dict(about.files.values())
        for row in plan:
            manifest = self.source.manifest(row)
            sizes |= {name: manifest.objects[name] for name in needed_objects(manifest, row)}
        self.total_bytes = sum(size for name, size in sizes.items() if self.sizes.get(name) != size)
        self.destination.require_room(self.total_bytes)
        for name, size in about.files.values():
            self._add(name, size)
        if ABOUT not in self.destination.names():
            # In this order: what has the one is a history, and has the other.
            self.destination.write(INDEX, self.catalogue.to_json())
            self.destination.write(ABOUT, self.source.place.read(ABOUT))

    def send(self, row: Row) -> None:
        """Send what a checkpoint needs to its precision, then list it."""
        self.send_objects(row)
        self.destination.write(row.manifest, self.source.place.read(row.manifest))
        rows = {known.step: known for known in self.catalogue.rows} | {row.step: row}
        catalogue = self.catalogue.with_rows(rows)
        self.destination.write(INDEX, catalogue.to_json())
        self.catalogue = catalogue

    def send_objects(self, row: Row) -> None:
        """Send what a checkpoint needs to its precision and the destination has not, or not whole."""
        manifest = self.source.manifest(row)
        for name in needed_objects(manifest, row):
            self._add(name, manifest.objects[name])

    def _add(self, name: str, size: int) -> None:
        if self.sizes.get(name) != size:
            self.on_progress(self.source.place.name, self.done_bytes, self.total_bytes)
            self.destination.add_object(self.source.place, name, size)
            self.sizes[name] = size
            self.done_bytes += size
            self.on_progress(self.source.place.name, self.done_bytes, self.total_bytes)


def _hashes(manifest: Manifest) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in manifest.tensors.items()}
