"""Frames → a tensor's raw bytes: fetches the ranges of a part at once and decodes from the key frame on.

The base layers along the way are kept as far as a budget allows, so that the next step of the same tensor decodes one
frame, not a chain. What this leaves out: which checkpoint (`reading`).
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from minicpm.errors import CheckpointError
from minicpm.formats.block_type import Bytes
from minicpm.formats.weight import Weight
from minicpm.history import coding
from minicpm.history.catalogue import OBJECTS
from minicpm.history.codec import Reference
from minicpm.history.manifest import Extent, Part, TensorEntry
from minicpm.history.place import MissingFileError, Place


class Decoder:
    """Reads tensors of a history; safe to share among threads.

    Args:
        place: where the objects lie.
        cache_bytes: for base layers of what was read last.
    """

    def __init__(self, place: Place, cache_bytes: int) -> None:
        self._place = place
        self._budget = cache_bytes
        # By where the frame lies.
        self._held: OrderedDict[tuple[str, int], Reference] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()

    def weight(self, name: str, entry: TensorEntry, is_exact: bool, where: str) -> Weight:
        """Return a tensor; its hash is checked where it was read exactly.

        Raises:
            CheckpointError: an object is missing, truncated or damaged; it names the tensor and the object.
        """
        data = np.empty((entry.num_bytes // entry.row_bytes, entry.row_bytes), np.uint8)
        first = 0
        for part in entry.parts:
            data[first : first + part.num_rows] = self.part(entry, part, is_exact, f"{where}: {name}")[0]
            first += part.num_rows
        if is_exact and coding.digest(data) != entry.sha256:
            raise CheckpointError(f"{where}: {name} decodes to other values than were stored (its SHA-256 differs)")
        return Weight(entry.block_type, entry.shape, data)

    def part(self, entry: TensorEntry, part: Part, is_exact: bool, where: str) -> tuple[Bytes, Reference | None]:
        """Return the raw bytes of a part, uint8 (rows, row_bytes), and the reference for the next frame.

        Raises:
            CheckpointError: as `weight`.
        """
        reference, done = self._nearest(part.frames)
        shape = (part.num_rows, entry.row_bytes)
        todo = part.frames[done:]
        extents = [*todo, *part.extents(is_exact)[len(part.frames) :]]
        fetched = self._fetch(extents, where)
        content: Bytes | None = None
        for index, (frame, base) in enumerate(zip(todo, fetched, strict=False)):
            # Of the frames before, only the base layer counts.
            is_last = index == len(todo) - 1
            refinement = None
            if is_last and is_exact:
                refinement = fetched[-1] if part.refinement is not None else []
            try:
                content, reference = coding.decode(entry.coding, base, refinement, reference, shape)
            except CheckpointError as error:
                raise CheckpointError(f"{where} in object {frame.object[:16]}…: {error}") from error
        assert content is not None
        self._hold(part.frames[-1], reference)
        return content, reference

    def _fetch(self, extents: Sequence[Extent], where: str) -> list[list[bytes]]:
        """Return the pieces of every extent."""
        ranges = [(f"{OBJECTS}/{extent.object}", extent.first, extent.num_bytes) for extent in extents]
        try:
            contents = self._place.read_ranges(ranges)
        except MissingFileError as error:
            raise MissingFileError(f"{where} needs an object that is not there: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
        pieces = []
        for extent, content in zip(extents, contents, strict=True):
            ends = itertools.accumulate(extent.pieces, initial=0)
            pieces.append([content[a:b] for a, b in itertools.pairwise(ends)])
        return pieces

    def _nearest(self, frames: Sequence[Extent]) -> tuple[Reference | None, int]:
        """Return the newest reference that is held before the last frame, and how many frames it spares."""
        with self._lock:
            for done in range(len(frames) - 1, 0, -1):
                key = (frames[done - 1].object, frames[done - 1].first)
                if key in self._held:
                    self._held.move_to_end(key)
                    return self._held[key], done
        return None, 0

    def _hold(self, frame: Extent, reference: Reference | None) -> None:
        if reference is None or reference.num_bytes > self._budget:
            return
        key = (frame.object, frame.first)
        with self._lock:
            if key in self._held:
                return
            self._held[key] = reference
            self._held_bytes += reference.num_bytes
            while self._held_bytes > self._budget:
                _, dropped = self._held.popitem(last=False)
                self._held_bytes -= dropped.num_bytes
