"""Documents into rows of one length: who shares a row with whom, computed once per corpus and length, and kept.

A document of n tokens is n - 1 predictions: its inputs are cut into segments of at most one row, each token of it is
the target of exactly one input (the first of the next segment is the last target of the one before), and the last
token is never an input. Segments are packed best-fit-decreasing within windows of a scrambled order, so rows are full
to within a few tokens and a row mixes documents from all over the corpus. Documents in a row do not see each other, so
which ones share a row changes nothing but the padding; only the order of rows is drawn anew in every epoch.
Supervised rows are never cut: one that is too long keeps its head, and is dropped and counted if no target is left.

What this leaves out: the order of rows (`mixture`) and their arrays (`batches`).

Source: best-fit-decreasing packing as in Ding et al., "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpm.data.atomic import flush, new_folder
from minicpm.data.permutation import permute
from minicpm.data.shards import TokenShards, load_array
from minicpm.errors import DataError

_WINDOW_SEGMENTS = 1 << 16
_ORDER_KEY = 0x6D696E6963706D
# Part of the name of what is kept: raise it when the algorithm changes.
_VERSION = 1
_PLAN = "plan.json"


@dataclass(frozen=True)
class RowPlan:
    """Which segments each row holds.

    Attributes:
        starts: int64 (segments): the first input token of each segment, counted over all shards.
        lengths: int32 (segments): its input tokens.
        row_bounds: int64 (rows + 1): the segments of row r are row_bounds[r]…row_bounds[r+1]-1.
        num_inputs: input tokens in all rows.
        num_cut: supervised documents that kept their head only.
        num_dropped: supervised documents whose head has no target.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    row_bounds: NDArray[np.int64]
    num_inputs: int
    num_cut: int = 0
    num_dropped: int = 0

    @property
    def num_rows(self) -> int:
        """The number of rows: one epoch."""
        return len(self.row_bounds) - 1

    @property
    def tokens_per_row(self) -> float:
        """Mean input tokens of a row; the rest is padding."""
        return self.num_inputs / self.num_rows


def plan_rows(shards: TokenShards, sequence_length: int, *, keeps: bool = True) -> RowPlan:
    """Return the rows of `shards` for rows of `sequence_length`, read from where they were kept if they were.

    Args:
        shards: the documents.
        sequence_length: tokens of a row.
        keeps: whether to write the plan beside the shards; a folder that cannot be written to is no error.

    Raises:
        DataError: no document has a target, or the document index is damaged.
    """
    folder = shards.path / f"rows-{sequence_length}-v{_VERSION}"
    identity = {"content_hash": shards.manifest["content_hash"], "num_documents": shards.num_documents}
    kept = _read(folder, identity)
    if kept is not None:
        return kept
    plan = _pack_all(shards, sequence_length)
    if keeps:
        _keep(folder, plan, identity)
    return plan


def _pack_all(shards: TokenShards, sequence_length: int) -> RowPlan:
    starts, lengths, num_cut, num_dropped = _segments(shards, sequence_length)
    if not len(starts):
        raise DataError(
            f"{shards.path}: no supervised token is left in rows of {sequence_length}; use a longer sequence_length"
        )
    order = permute(np.arange(len(starts), dtype=np.int64), len(starts), _ORDER_KEY)
    rows: list[NDArray[np.int64]] = []
    counts: list[NDArray[np.int64]] = []
    for window in range(0, len(order), _WINDOW_SEGMENTS):
        members = order[window : window + _WINDOW_SEGMENTS]
        placed, sizes = _best_fit(lengths[members], sequence_length)
        rows.append(members[placed])
        counts.append(sizes)
    by_row = np.concatenate(rows)
    bounds = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return RowPlan(
        starts[by_row],
        lengths[by_row].astype(np.int32),
        bounds,
        int(lengths.sum()),
        num_cut,
        num_dropped,
    )


def _segments(shards: TokenShards, sequence_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int, int]:
    """Return the first input and the number of inputs of every segment, and how many documents were cut and dropped."""
    bounds = np.asarray(shards.bounds)
    inputs = np.diff(bounds) - 1
    if (inputs < 1).any():
        raise DataError(f"{shards.path}: document {int(np.argmax(inputs < 1))} is damaged; tokenize the text again")
    if shards.is_supervised:
        heads = np.minimum(inputs, sequence_length)
        cut = np.flatnonzero(inputs > sequence_length)
        is_kept = np.ones(len(inputs), dtype=bool)
        for index in cut:
            first = int(bounds[index])
            is_kept[index] = shards.supervised(first + 1, first + 1 + sequence_length).any()
        return bounds[:-1][is_kept], heads[is_kept], int(is_kept[cut].sum()), int((~is_kept).sum())
    pieces = -(-inputs // sequence_length)
    document = np.repeat(np.arange(len(inputs)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = bounds[:-1][document] + number * sequence_length
    return starts, np.minimum(inputs[document] - number * sequence_length, sequence_length), 0, 0


def _best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the segments in order of rows, and the number of segments of each row.

    Longest first, each into the fullest row that has room. Rows are kept by their room; the set of rooms in use is one
    integer, whose lowest set bit at or above a length is the best fit.
    """
    order = np.argsort(-lengths, kind="stable")
    full = int((lengths == capacity).sum())
    rows: list[list[int]] = [[segment] for segment in order[:full].tolist()]
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for segment, length in zip(order[full:].tolist(), lengths[order[full:]].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            rows[row].append(segment)
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room = capacity
            row = len(rows)
            rows.append([segment])
        room -= length
        if room:
            with_room[room].append(row)
            rooms |= 1 << room
    sizes = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    return np.fromiter((segment for row in rows for segment in row), np.int64, len(lengths)), sizes


def _read(folder: Path, identity: dict[str, Any]) -> RowPlan | None:
    try:
        facts = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
        if any(facts.get(name) != value for name, value in identity.items()):
            return None
        return RowPlan(
            load_array(folder / "starts.npy", facts["num_segments"]),
            load_array(folder / "lengths.npy", facts["num_segments"]),
            load_array(folder / "row_bounds.npy", facts["num_rows"] + 1),
            facts["num_inputs"],
            facts["num_cut"],
            facts["num_dropped"],
        )
    except (OSError, ValueError, KeyError, TypeError, DataError):
        # What was kept is only a saving of time: anything wrong with it, and it is computed again.
        return None


def _keep(folder: Path, plan: RowPlan, identity: dict[str, Any]) -> None:
    facts = {name: getattr(plan, name) for name in ("num_rows", "num_inputs", "num_cut", "num_dropped")}
    arrays: dict[str, NDArray[Any]] = {"starts": plan.starts, "lengths": plan.lengths, "row_bounds": plan.row_bounds}
    try:
        with new_folder(folder, replaces=True) as temporary:
            for name, array in arrays.items():
                with (temporary / f"{name}.npy").open("wb") as file:
                    np.save(file, array, allow_pickle=False)
                    flush(file)
            text = json.dumps(identity | facts | {"num_segments": len(plan.starts)}, indent=2)
            (temporary / _PLAN).write_text(text, encoding="utf-8")
    except (OSError, DataError):
        # A read-only corpus, a full disk, or another process that was faster: the plan in memory is as good.
        return
