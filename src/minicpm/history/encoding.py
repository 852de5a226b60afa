"""One checkpoint → two objects, the base layer and the refinement of all its tensors, and the manifest that says where.

What this leaves out: manifests' files and the index (`store`), and the arithmetic (`coding`, `codec`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from minicpm.formats.block_type import Bytes
from minicpm.formats.weight import Weight
from minicpm.history import coding
from minicpm.history.catalogue import About
from minicpm.history.codec import Reference
from minicpm.history.decoding import Decoder
from minicpm.history.manifest import Extent, Facts, Manifest, Part, TensorEntry
from minicpm.history.objects import UNNAMED, NewObject
from minicpm.history.parallel import in_order
from minicpm.history.place import Folder

# References of the newest checkpoint are kept up to so many bytes; the others are decoded again when needed.
_REFERENCE_BYTES = 512 << 20


@dataclass(frozen=True)
class _Tensor:
    """A tensor that must be written: its entry, whose parts are made one by one."""

    entry: TensorEntry
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    """A part that must be coded: from `before` if that is not None."""

    name: str
    index: int
    data: Bytes
    tensor: _Tensor
    before: TensorEntry | None


class Encoder:
    """Codes checkpoints into a folder's objects, each from the base layer of an earlier one.

    Args:
        folder: of the history.
        about: whose base error and number of reads hold.
    """

    def __init__(self, folder: Folder, about: About) -> None:
        self._folder = folder
        self._about = about
        self._decoder = Decoder(folder, cache_bytes=0)
        self._held: dict[tuple[str, int], Reference] = {}
        self._held_of: tuple[Extent, ...] | None = None

    def encode(self, facts: Facts, weights: Mapping[str, Weight], before: Manifest | None) -> tuple[Manifest, int]:
        """Return the manifest of a checkpoint whose objects are on the disk, and the bytes that they took.

        Args:
            facts: where it stands.
            weights: its tensors; each is asked for once.
            before: the checkpoint that it is coded from; None makes a key frame.

        Raises:
            OSError: the disk does not take it; nothing has changed then.
        """
        if before is None or self._held_of != _newest_frames(before):
            self._held = {}
        entries: dict[str, TensorEntry | _Tensor] = {}
        held: dict[tuple[str, int], Reference] = {}
        base, refinement = NewObject(self._folder), NewObject(self._folder)
        try:
            tasks = self._tasks(weights, before, entries, held)
            for task, frames, coded in in_order(self._code, tasks):
                lower = base.add(coded.base)
                upper = refinement.add(coded.refinement) if coded.refinement else None
                task.tensor.parts.append(Part(len(task.data), (*frames, lower), upper))
                _keep(held, (task.name, task.index), coded.reference)
            names = [base.close(), refinement.close()]
        finally:
            base.discard()
            refinement.discard()
        tensors = {name: e if isinstance(e, TensorEntry) else _named(e, names) for name, e in entries.items()}
        added = {name: new.num_bytes for name, new in zip(names, (base, refinement), strict=True) if name}
        link = (before.facts.step, before.weights_sha256) if before is not None else (None, None)
        manifest = Manifest(facts, {}, tensors, *link)
        known = {**(before.objects if before is not None else {}), **added}
        used = dict.fromkeys(extent.object for extent in manifest.extents())
        manifest = dataclasses.replace(manifest, objects={name: known[name] for name in used})
        self._held, self._held_of = held, _newest_frames(manifest)
        return manifest, sum(added.values())

    def _tasks(
        self,
        weights: Mapping[str, Weight],
        before: Manifest | None,
        entries: dict[str, TensorEntry | _Tensor],
        held: dict[tuple[str, int], Reference],
    ) -> Iterator[_Task]:
        """Yield every part that must be coded; what has the same values as before costs nothing."""
        for name in weights:
            weight = weights[name]
            old = before.tensors.get(name) if before is not None else None
            if old is not None and (old.shape, old.block_type) != (weight.shape, weight.block_type):
                old = None
            digest = coding.digest(weight.data)
            if old is not None and old.sha256 == digest:
                entries[name] = old
                for index in range(len(old.parts)):
                    _keep(held, (name, index), self._held.get((name, index)))
                continue
            kind = coding.coding_of(weight)
            tensor = _Tensor(TensorEntry(weight.block_type, weight.shape, digest, kind, ()))
            entries[name] = tensor
            usable = old if old is not None and coding.uses_previous(kind) else None
            for index, (first, rows) in enumerate(coding.cut(*weight.data.shape)):
                yield _Task(name, index, weight.data[first : first + rows], tensor, usable)

    def _code(self, task: _Task) -> tuple[_Task, tuple[Extent, ...], coding.Coded]:
        frames, reference = self._start(task)
        entry = task.tensor.entry
        coded = coding.encode(entry.coding, task.data, entry.block_type, reference, self._about.base_error)
        return task, frames, coded

    def _start(self, task: _Task) -> tuple[tuple[Extent, ...], Reference | None]:
        """Return the frames that a part goes on from and its reference; none where it becomes a key frame."""
        # The frames before, this one, and its refinement.
        if task.before is None or len(task.before.parts[task.index].frames) + 2 > self._about.max_reads:
            return (), None
        part = task.before.parts[task.index]
        reference = self._held.get((task.name, task.index))
        if reference is None:
            where = f"{self._folder.name}: {task.name}"
            reference = self._decoder.part(task.before, part, False, where)[1]
        return part.frames, reference


def _newest_frames(manifest: Manifest) -> tuple[Extent, ...]:
    """Return what tells a coded checkpoint from every other one."""
    return tuple(part.frames[-1] for entry in manifest.tensors.values() for part in entry.parts)


def _keep(held: dict[tuple[str, int], Reference], key: tuple[str, int], reference: Reference | None) -> None:
    if reference is not None and sum(r.num_bytes for r in held.values()) + reference.num_bytes <= _REFERENCE_BYTES:
        held[key] = reference


def _named(tensor: _Tensor, names: list[str | None]) -> TensorEntry:
    """Return the entry of a tensor with the names of the objects that its newest frame lies in."""

    def named(extent: Extent, name: str | None) -> Extent:
        return extent if extent.object != UNNAMED else dataclasses.replace(extent, object=name or UNNAMED)

    parts = []
    for part in tensor.parts:
        frames = tuple(named(frame, names[0]) for frame in part.frames)
        parts.append(Part(part.num_rows, frames, part.refinement and named(part.refinement, names[1])))
    return dataclasses.replace(tensor.entry, parts=tuple(parts))
