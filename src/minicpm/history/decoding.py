"""Frames → a tensor's raw bytes: fetches the ranges of all parts at once and decodes from the key frame on.

The references along the way are kept as far as a budget allows, so that the next step of the same tensor decodes one
frame, not a chain. What this leaves out: which checkpoint (`reading`).
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from minicpm.errors import CheckpointError
from minicpm.formats.block_type import Bytes
from minicpm.formats.weight import Weight
from minicpm.history import coding
from minicpm.history.catalogue import OBJECTS
from minicpm.history.manifest import Extent, Frame, Part, TensorEntry
from minicpm.history.place import MissingFileError, Place

# The frame that a reference stands behind, and to which precision it was read.
_Key = tuple[str, int, bool]


class Decoder:
    """Reads tensors of a history; safe to share among threads.

    Args:
        place: where the objects lie.
        cache_bytes: for references of what was read last.
    """

    def __init__(self, place: Place, cache_bytes: int = 256 << 20) -> None:
        self._place = place
        self._budget = cache_bytes
        self._held: OrderedDict[_Key, tuple[Any, int]] = OrderedDict()
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
            content, _ = self.part(name, entry, part, is_exact, where)
            data[first : first + part.num_rows] = content
            first += part.num_rows
        if is_exact and coding.digest(data) != entry.sha256:
            raise CheckpointError(f"{where}: {name} decodes to other values than were stored (its SHA-256 differs)")
        return Weight(entry.block_type, entry.shape, data)

    def part(self, name: str, entry: TensorEntry, part: Part, is_exact: bool, where: str) -> tuple[Bytes, Any]:
        """Return the raw bytes of a part, uint8 (rows, row_bytes), and the reference for the next frame.

        Raises:
            CheckpointError: as `weight`.
        """
        reference, done = self._nearest(part.frames, is_exact)
        content: Bytes | None = None
        shape = (part.num_rows, entry.row_bytes)
        # Even where the last frame's reference is held, its values come from decoding that frame: a reference is the
        # codec's own business.
        todo = part.frames[done:]
        extents = [extent for frame in todo for extent in frame.extents(is_exact)]
        fetched = iter(self._fetch(extents, f"{where}: {name}"))
        for frame in todo:
            base = next(fetched)
            refinement = next(fetched) if is_exact and frame.refinement is not None else None
            if frame.refinement is None:
                refinement = []
            try:
                content, reference = coding.decode(entry.coding, base, refinement, reference, shape, entry.block_type)
            except CheckpointError as error:
                raise CheckpointError(f"{where}: {name} in object {frame.base.object[:16]}…: {error}") from error
        assert content is not None
        self._hold(part.frames[-1], is_exact, reference)
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

    def _nearest(self, frames: Sequence[Frame], is_exact: bool) -> tuple[Any, int]:
        """Return the newest reference that is held before the last frame, and how many frames it spares."""
        with self._lock:
            for done in range(len(frames) - 1, 0, -1):
                key = _key(frames[done - 1], is_exact)
                if key in self._held:
                    self._held.move_to_end(key)
                    return self._held[key][0], done
        return None, 0

    def _hold(self, frame: Frame, is_exact: bool, reference: Any) -> None:
        size = coding.reference_bytes(reference)
        if not size or size > self._budget:
            return
        key = _key(frame, is_exact)
        with self._lock:
            if key in self._held:
                return
            self._held[key] = (reference, size)
            self._held_bytes += size
            while self._held_bytes > self._budget:
                _, (_, freed) = self._held.popitem(last=False)
                self._held_bytes -= freed


def _key(frame: Frame, is_exact: bool) -> _Key:
    return frame.base.object, frame.base.first, is_exact
