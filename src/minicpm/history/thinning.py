"""Keeping fewer checkpoints: which stay, and coding those anew that were coded from one that goes.

Nothing is deleted before the index lists only what stays; published checkpoints and all that they need are left alone,
to the byte. What this leaves out: deciding when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minicpm.errors import CheckpointError
from minicpm.history.catalogue import OBJECTS, Row
from minicpm.history.manifest import FOLDER, Manifest
from minicpm.history.place import PARTIAL
from minicpm.history.reading import History
from minicpm.history.store import HistoryWriter, disk_errors


@dataclass(frozen=True)
class ThinRule:
    """Which checkpoints stay, besides the published ones and the last.

    Attributes:
        every: multiples of this many steps; 0 for none.
        stages: all of these stages.
        is_early_kept: step 0 and the powers of two.
        steps: these too.
    """

    every: int = 0
    stages: tuple[str, ...] = ()
    is_early_kept: bool = False
    steps: tuple[int, ...] = ()

    def keeps(self, row: Row) -> bool:
        """Return whether a checkpoint stays."""
        step = row.step
        return (
            row.is_published
            or step in self.steps
            or row.stage in self.stages
            or bool(self.every and step % self.every == 0)
            or (self.is_early_kept and step & (step - 1) == 0)
        )

    def kept(self, rows: Sequence[Row]) -> list[int]:
        """Return the steps that stay."""
        return [row.step for row in rows if self.keeps(row) or row is rows[-1]]


def thin(
    writer: HistoryWriter, rule: ThinRule, on_progress: Callable[[str], None] = lambda line: None
) -> tuple[list[int], int]:
    """Make the history hold only what `rule` keeps; return the steps that went and the bytes that were freed.

    Raises:
        CheckpointError: a checkpoint that stays cannot be read, or the disk does not take the new ones; the history is
            as it was then.
    """
    rows = writer.rows
    kept = rule.kept(writer.catalogue.rows)
    gone = [step for step in rows if step not in set(kept)]
    manifests = {step: writer.manifest(step) for step in rows}
    first_seen: dict[str, int] = {}
    for step, manifest in manifests.items():
        for name in manifest.objects:
            first_seen.setdefault(name, step)
    history = History(writer.folder.path, cache_bytes=1 << 30)
    # What published checkpoints need stays in any case.
    safe = {name for step in kept if rows[step].is_published for name in manifests[step].objects}
    new_rows: dict[int, Row] = {}
    previous: Manifest | None = None
    with disk_errors(writer.folder.path):
        for step in kept:
            manifest, row = manifests[step], rows[step]
            own = {name for name in manifest.objects if first_seen[name] == step}
            # One of which only the base layer is here cannot be coded anew.
            if not row.is_published and row.precision == "exact" and not manifest.objects.keys() <= safe | own:
                on_progress(f"coding step {step} anew")
                manifest, num_bytes = writer.encoder.encode(manifest.facts, history[step].weights(), previous)
                row = dataclasses.replace(writer.write_manifest(manifest, num_bytes), is_published=False)
            safe |= manifest.objects.keys()
            new_rows[step] = row
            previous = manifest if row.precision == "exact" else previous
        writer.replace_rows(new_rows)
        return gone, remove_unlisted(writer)


def remove_unlisted(writer: HistoryWriter) -> int:
    """Delete the manifests that the index does not list and the objects that no listed one needs; return the bytes.

    Raises:
        CheckpointError: a listed manifest cannot be read: nothing is deleted then.
    """
    folder = writer.folder
    needed = {name for name, _ in writer.about.files.values()}
    listed = set()
    for step, row in writer.rows.items():
        listed.add(row.manifest.removeprefix(f"{FOLDER}/"))
        needed |= writer.manifest(step).objects.keys()
    freed = 0
    for place, keep in ((FOLDER, listed), (OBJECTS, needed)):
        for name in folder.names(place):
            if name not in keep and not name.startswith(PARTIAL):
                freed += folder.size(f"{place}/{name}")
                folder.remove(f"{place}/{name}")
    return freed


def publish(writer: HistoryWriter, steps: Sequence[int]) -> None:
    """Mark checkpoints as published: thinning will never touch them.

    Raises:
        CheckpointError: a step that is not there, or the disk does not take the index.
    """
    rows = writer.rows
    for step in steps:
        if step not in rows:
            raise CheckpointError(f"{writer.folder.name} has no checkpoint of step {step} to publish")
        rows[step] = dataclasses.replace(rows[step], is_published=True)
    with disk_errors(writer.folder.path):
        writer.replace_rows(rows)
