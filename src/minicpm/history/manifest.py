"""The manifest of one checkpoint: where it stands in its run, and where every byte of every tensor lies.

It is complete on its own: a tensor's frames, from its key frame on, are listed with their objects, offsets and lengths,
so that reading one needs no other checkpoint's manifest. As JSON, an object is its place in the list `objects` and

    extent = [object, offset, [lengths]]                 pieces that lie one after the other
    part   = [rows, [extent, extent, …], extent]         headers and base layers from the key frame on; the refinement

A base layer is coded from the base layer before it; the refinement of the last one makes it exact.

What this leaves out: the bytes (`coding`), and the list of checkpoints (`catalogue`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from minicpm import __version__
from minicpm.errors import CheckpointError, FormatError
from minicpm.formats import blocks
from minicpm.formats.json_file import parse_json

FORMAT_VERSION = 1
FOLDER = "checkpoints"
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX = 1 << 53


@dataclass(frozen=True)
class Facts:
    """Where a checkpoint stands.

    Attributes:
        step: updates made.
        tokens: tokens seen.
        stage: warmup, stable, decay or tail; of an aligned model, its method.
        lr: the base group's learning rate of the last update.
        batch_sequences: rows of the last update's batch.
        losses: named measurements: `train`, `heldout_loss`, `grad_norm` …
        data_cursor: what says which data comes next.
        seed: of weights and data order.
        parent: "RUN@STEP hash" of the checkpoint that the run began from; None is a run from nothing.
        labels: anything else worth keeping, such as where an imported file came from.
    """

    step: int
    tokens: int = 0
    stage: str = "stable"
    lr: float = 0.0
    batch_sequences: int = 0
    losses: Mapping[str, float] = field(default_factory=dict)
    data_cursor: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    parent: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Extent:
    """Pieces that lie one after the other in an object, from byte `first` on."""

    object: str
    first: int
    pieces: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of all pieces."""
        return sum(self.pieces)


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a tensor, coded alone.

    `frames` are the base layers that lead to this checkpoint, the key frame first, each after its header; `refinement`
    is None where the base layer is exact.
    """

    num_rows: int
    frames: tuple[Extent, ...]
    refinement: Extent | None

    def extents(self, is_exact: bool) -> tuple[Extent, ...]:
        """Return what a reader of this precision fetches."""
        return (*self.frames, self.refinement) if is_exact and self.refinement is not None else self.frames


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor: `sha256` is that of its raw bytes, `coding` says how its frames are read."""

    block_type: str
    shape: tuple[int, ...]
    sha256: str
    coding: str
    parts: tuple[Part, ...]

    @property
    def row_bytes(self) -> int:
        """The raw bytes of a row of the last axis."""
        return blocks.block_type(self.block_type).row_bytes(self.shape[-1])

    @property
    def num_bytes(self) -> int:
        """The raw bytes of the tensor."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Manifest:
    """A checkpoint: `objects` maps each object's hash to its length.

    `previous` is the step that it was coded from, and `previous_weights_sha256` the hash of that one's weights, None
    in histories of earlier versions: so that steps whose places were exchanged do not go unseen.
    """

    facts: Facts
    objects: Mapping[str, int]
    tensors: Mapping[str, TensorEntry]
    previous: int | None = None
    previous_weights_sha256: str | None = None
    code_version: str = __version__

    def to_json(self) -> bytes:
        """Return the file's content."""
        places = {name: index for index, name in enumerate(self.objects)}

        def extent(e: Extent | None) -> list[Any]:
            return [] if e is None else [places[e.object], e.first, list(e.pieces)]

        def part(p: Part) -> list[Any]:
            return [p.num_rows, [extent(frame) for frame in p.frames], extent(p.refinement)]

        tensors = {
            name: {
                "type": entry.block_type,
                "shape": list(entry.shape),
                "sha256": entry.sha256,
                "coding": entry.coding,
                "parts": [part(p) for p in entry.parts],
            }
            for name, entry in self.tensors.items()
        }
        value = {
            "format_version": FORMAT_VERSION,
            "code_version": self.code_version,
            **dataclasses.asdict(self.facts),
            "previous": self.previous,
            "previous_weights_sha256": self.previous_weights_sha256,
            "objects": [[name, size] for name, size in self.objects.items()],
            "tensors": tensors,
        }
        return (json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n").encode()

    @property
    def num_bytes(self) -> int:
        """The raw bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def weights_sha256(self) -> str:
        """The hash of all tensors' names, types, shapes and hashes: of what was trained, however it is coded."""
        lines = [f"{name} {e.block_type} {e.shape} {e.sha256}\n" for name, e in sorted(self.tensors.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def extents(self, is_exact: bool = True) -> Iterator[Extent]:
        """Return every extent that any tensor of this checkpoint needs."""
        for entry in self.tensors.values():
            for part in entry.parts:
                yield from part.extents(is_exact)


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Return the manifest in `text`, every number checked; `where` is for messages.

    Raises:
        CheckpointError: not a manifest, of a newer version, or one that contradicts itself.
    """
    try:
        value = parse_json(text, where)
        check_version(value.get("format_version"), where)
        objects = {str(name): _count(size) for name, size in value["objects"]}
        if not all(_HASH.fullmatch(name) for name in objects):
            raise ValueError("an object's name is no SHA-256")
        names = list(objects)
        tensors = {name: _tensor(entry, names, objects) for name, entry in value["tensors"].items()}
        previous, link = value["previous"], value.get("previous_weights_sha256")
        if link is not None and not _HASH.fullmatch(link):
            raise ValueError("the hash of the step before is no SHA-256")
        return Manifest(
            facts=_facts(value),
            objects=objects,
            tensors=tensors,
            previous=None if previous is None else _count(previous),
            previous_weights_sha256=link,
            code_version=str(value["code_version"]),
        )
    except KeyError as error:
        raise CheckpointError(f"{where} is no manifest of a checkpoint: {error} is missing") from error
    except (FormatError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{where} is no manifest of a checkpoint: {error}") from error


def check_version(version: Any, where: str) -> None:
    """Return if this program reads format `version`.

    Raises:
        CheckpointError: it is newer, or no version.
    """
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where} has no format version: it is no file of a history")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {version}, this program reads up to {FORMAT_VERSION}; upgrade minicpm"
        )


def _facts(value: Mapping[str, Any]) -> Facts:
    losses = {str(name): float(number) for name, number in value["losses"].items()}
    parent = value["parent"]
    return Facts(
        step=_count(value["step"]),
        tokens=_count(value["tokens"]),
        stage=str(value["stage"]),
        lr=float(value["lr"]),
        batch_sequences=_count(value["batch_sequences"]),
        losses=losses,
        data_cursor=dict(value["data_cursor"]),
        seed=int(value["seed"]),
        parent=None if parent is None else str(parent),
        labels={str(name): str(text) for name, text in value["labels"].items()},
    )


def _tensor(value: Mapping[str, Any], names: list[str], objects: Mapping[str, int]) -> TensorEntry:
    shape = tuple(_count(size) for size in value["shape"])
    if not shape or len(shape) > 8 or not all(shape) or not _HASH.fullmatch(value["sha256"]):
        raise ValueError(f"a tensor of shape {shape} or without a SHA-256")

    def extent(item: list[Any]) -> Extent:
        return _extent(item, names, objects)

    parts = tuple(
        Part(_count(rows), tuple(map(extent, frames)), extent(last) if last else None)
        for rows, frames, last in value["parts"]
    )
    entry = TensorEntry(str(value["type"]), shape, value["sha256"], str(value["coding"]), parts)
    if sum(part.num_rows for part in parts) != math.prod(shape[:-1]) or not all(part.frames for part in parts):
        raise ValueError(f"the parts of a tensor of shape {shape} do not make its rows")
    blocks.block_type(entry.block_type)
    return entry


def _extent(value: list[Any], names: list[str], objects: Mapping[str, int]) -> Extent:
    name, first, pieces = value
    extent = Extent(names[_count(name)], _count(first), tuple(_count(length) for length in pieces))
    if not pieces or extent.first + extent.num_bytes > objects[extent.object]:
        raise ValueError(f"pieces end behind their object {extent.object[:12]}…")
    return extent


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX:
        raise ValueError(f"{value!r:.40} is no count")
    return value
