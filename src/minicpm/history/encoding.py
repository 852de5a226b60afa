"""One checkpoint → two objects, the base layer and the refinement of all its tensors, and the manifest that says where.

What this leaves out: manifests' files and the index (`store`), and the arithmetic (`coding`, `codec`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from minicpm.formats.weight import Weight
from minicpm.history import coding
from minicpm.history.catalogue import About
from minicpm.history.decoding import Decoder
from minicpm.history.manifest import Extent, Facts, Frame, Manifest, Part, TensorEntry
from minicpm.history.objects import NewObject
from minicpm.history.place import Folder

# References of the newest checkpoint are kept up to so many bytes; the others are decoded again when needed.
_REFERENCE_BYTES = 512 << 20


class Encoder:
    """Codes checkpoints into a folder's objects, each from the values of an earlier one.

    Args:
        folder: of the history.
        about: whose base error and number of reads hold.
    """

    def __init__(self, folder: Folder, about: About) -> None:
        self._folder = folder
        self._about = about
        self._decoder = Decoder(folder, cache_bytes=0)
        self._held: dict[tuple[str, int], Any] = {}
        self._held_of: int | None = None

    def encode(self, facts: Facts, weights: Mapping[str, Weight], before: Manifest | None) -> tuple[Manifest, int]:
        """Return the manifest of a checkpoint whose objects are on the disk, and the bytes that they took.

        Args:
            facts: where it stands.
            weights: its tensors; each is asked for once.
            before: the checkpoint that it is coded from; None makes a key frame.

        Raises:
            OSError: the disk does not take it; nothing has changed then.
        """
        coder = _Coder(self, before)
        base, refinement = NewObject(self._folder), NewObject(self._folder)
        try:
            entries = {name: coder.tensor(name, weights[name], base, refinement) for name in weights}
            names = [base.close(), refinement.close()]
        finally:
            base.discard()
            refinement.discard()
        tensors = {name: _named(entry, names) for name, entry in entries.items()}
        added = {name: new.num_bytes for name, new in zip(names, (base, refinement), strict=True) if name}
        manifest = Manifest(facts, {}, tensors, before.facts.step if before is not None else None)
        known = {**(before.objects if before is not None else {}), **added}
        used = dict.fromkeys(extent.object for extent in manifest.extents())
        self._held, self._held_of = coder.references, facts.step
        return dataclasses.replace(manifest, objects={name: known[name] for name in used}), sum(added.values())

    def held(self, step: int, name: str, index: int) -> Any:
        """Return the reference of a part after `step` if it is in memory, else None."""
        return self._held.get((name, index)) if self._held_of == step else None

    def reference(self, step: int, name: str, entry: TensorEntry, index: int) -> Any:
        """Return what the part `index` of a tensor is coded from after `step`."""
        held = self.held(step, name, index)
        if held is not None:
            return held
        where = f"{self._folder.name} step {step}"
        return self._decoder.part(name, entry, entry.parts[index], True, where)[1]

    @property
    def about(self) -> About:
        """What the history is of."""
        return self._about


class _Coder:
    """The coding of one checkpoint's tensors, in order."""

    def __init__(self, encoder: Encoder, before: Manifest | None) -> None:
        self._encoder = encoder
        self._before = before
        self.references: dict[tuple[str, int], Any] = {}
        self._kept_bytes = 0

    def tensor(self, name: str, weight: Weight, base: NewObject, refinement: NewObject) -> TensorEntry:
        """Write one tensor; the values that it had before cost nothing."""
        kind = coding.coding_of(weight)
        digest = coding.digest(weight.data)
        before = self._before.tensors.get(name) if self._before is not None else None
        if before is not None and (before.shape, before.block_type) != (weight.shape, weight.block_type):
            before = None
        if before is not None and before.sha256 == digest:
            self._carry(name, len(before.parts))
            return before
        parts = []
        for index, (first, rows) in enumerate(coding.cut(*weight.data.shape)):
            frames, reference = self._start(name, before, index, kind)
            data = weight.data[first : first + rows]
            coded = coding.encode(kind, data, weight.block_type, reference, self._encoder.about.base_error)
            lower = base.add([coded.header, *coded.base])
            frame = Frame(lower, refinement.add(coded.refinement) if coded.refinement else None)
            parts.append(Part(rows, (*frames, frame)))
            self._keep((name, index), coded.reference)
        return TensorEntry(weight.block_type, weight.shape, digest, kind, tuple(parts))

    def _start(self, name: str, before: TensorEntry | None, index: int, kind: str) -> tuple[tuple[Frame, ...], Any]:
        """Return the frames that a part goes on from and its reference; none where it becomes a key frame."""
        if before is None or self._before is None or not coding.uses_previous(kind):
            return (), None
        frames = before.parts[index].frames
        # A frame is read in two ranges.
        if 2 * len(frames) + 2 > self._encoder.about.max_reads:
            return (), None
        return frames, self._encoder.reference(self._before.facts.step, name, before, index)

    def _carry(self, name: str, num_parts: int) -> None:
        assert self._before is not None
        for index in range(num_parts):
            self._keep((name, index), self._encoder.held(self._before.facts.step, name, index))

    def _keep(self, key: tuple[str, int], reference: Any) -> None:
        size = coding.reference_bytes(reference)
        if size and self._kept_bytes + size <= _REFERENCE_BYTES:
            self.references[key] = reference
            self._kept_bytes += size


def _named(entry: TensorEntry, names: list[str | None]) -> TensorEntry:
    """Return `entry` with the names of the objects that its newest frames lie in."""

    def extent(e: Extent, name: str | None) -> Extent:
        return e if e.object else dataclasses.replace(e, object=name or "")

    parts = []
    for part in entry.parts:
        *older, newest = part.frames
        refinement = newest.refinement and extent(newest.refinement, names[1])
        parts.append(Part(part.num_rows, (*older, Frame(extent(newest.base, names[0]), refinement))))
    return dataclasses.replace(entry, parts=tuple(parts))
