"""What a history holds: `history.json` says what it is of, `index.json` lists its checkpoints.

A checkpoint exists from the moment that the index lists it; the index is replaced as a whole and last. So a crash at
any moment leaves a history of whole checkpoints, and a reader never sees a half-written one. What this leaves out: the
manifests (`manifest`), and writing (`store`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minicpm import __version__
from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, ConfigError, FormatError
from minicpm.formats.hf_config import config_from_hf, config_to_hf
from minicpm.formats.json_file import parse_json
from minicpm.history.manifest import FOLDER, FORMAT_VERSION, Manifest, check_version
from minicpm.history.place import MissingFileError, Place

ABOUT, INDEX, OBJECTS = "history.json", "index.json", "objects"
KIND = "minicpm history"
Precision = Literal["base", "exact"]
PRECISIONS: tuple[Precision, ...] = ("base", "exact")


@dataclass(frozen=True)
class About:
    """What a history is of.

    Attributes:
        config: the network.
        tokenizer_sha256: the fingerprint of the tokenizer that made the data.
        run: the resolved configuration of the run as plain data.
        files: small files that make a checkpoint a model folder (tokenizer.json …): name → (object, bytes).
        base_error: root-mean-square error of the base layer, as a share of each row's standard deviation.
        max_reads: byte ranges that any part of a tensor needs at most, at any step: its base layers from the key frame
            on, and one refinement.
        code_version: what made it.
    """

    config: ModelConfig
    tokenizer_sha256: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    base_error: float = 0.06
    max_reads: int = 16
    code_version: str = __version__

    def __post_init__(self) -> None:
        if self.max_reads < 2:
            raise ConfigError(f"max_reads must be at least 2, a key frame and its refinement, got {self.max_reads}")
        if not 0.005 <= self.base_error <= 0.5:
            raise ConfigError(f"base_error must lie between 0.005 and 0.5, got {self.base_error}")

    def to_json(self) -> bytes:
        """Return the file's content."""
        value = {
            "format": KIND,
            "format_version": FORMAT_VERSION,
            "code_version": self.code_version,
            "config": config_to_hf(self.config),
            "tokenizer_sha256": self.tokenizer_sha256,
            "run": dict(self.run),
            "files": {name: list(entry) for name, entry in self.files.items()},
            "base_error": self.base_error,
            "max_reads": self.max_reads,
        }
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Row:
    """A checkpoint in the index: what a list shows, and which manifest it is.

    Attributes:
        step: updates made.
        tokens: tokens seen.
        stage: of its last update.
        lr: of its last update.
        losses: its measurements.
        num_bytes: what it added to the store, refinement included.
        is_key: whether most of it can be read without an earlier one.
        manifest_sha256: the hash of the manifest; its file's name begins with the step.
        precision: how exactly it can be read here.
        is_published: whether others rely on it: thinning leaves it and all that it needs alone.
    """

    step: int
    tokens: int
    stage: str
    lr: float
    losses: Mapping[str, float]
    num_bytes: int
    is_key: bool
    manifest_sha256: str
    precision: Precision = "exact"
    is_published: bool = False

    @property
    def manifest(self) -> str:
        """The manifest's path in the history."""
        return f"{FOLDER}/step-{self.step:09d}-{self.manifest_sha256[:16]}.json"


@dataclass(frozen=True)
class Catalogue:
    """The index: checkpoints by rising step, and the hash of `history.json`."""

    about_sha256: str
    rows: tuple[Row, ...]

    def to_json(self) -> bytes:
        """Return the file's content, a line for each checkpoint."""
        lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in self.rows]
        head = json.dumps({"format": KIND, "format_version": FORMAT_VERSION, "history_sha256": self.about_sha256})
        return (head[:-1] + ', "checkpoints": [\n' + ",\n".join(lines) + "\n]}\n").encode()

    def with_rows(self, rows: Mapping[int, Row]) -> Catalogue:
        """Return the catalogue of these rows."""
        return dataclasses.replace(self, rows=tuple(rows[step] for step in sorted(rows)))


def row_of(manifest: Manifest, text: bytes, num_bytes: int) -> Row:
    """Return the row of a manifest whose file holds `text` and whose checkpoint added `num_bytes`."""
    facts = manifest.facts
    # Tensors that stand still, as norms do in 16 bits, get their key frames at other steps.
    alone = sum(e.num_bytes for e in manifest.tensors.values() if all(len(part.frames) == 1 for part in e.parts))
    is_key = 2 * alone > manifest.num_bytes
    digest = hashlib.sha256(text).hexdigest()
    return Row(facts.step, facts.tokens, facts.stage, facts.lr, dict(facts.losses), num_bytes, is_key, digest)


def read_catalogue(place: Place) -> tuple[About, Catalogue]:
    """Return what the history at `place` is of, and what it holds.

    Raises:
        CheckpointError: no history there, one of a newer version, or damaged.
    """
    try:
        text = place.read(ABOUT)
    except MissingFileError as error:
        raise CheckpointError(
            f"{place.name} is no history: it has no {ABOUT}; give the folder `history` of a run, or its URL"
        ) from error
    about = parse_about(text, f"{place.name}/{ABOUT}")
    catalogue = parse_catalogue(place.read(INDEX), f"{place.name}/{INDEX}")
    if hashlib.sha256(text).hexdigest() != catalogue.about_sha256:
        raise CheckpointError(f"{place.name}/{ABOUT} was changed: its hash is not the one in {INDEX}")
    return about, catalogue


def parse_about(text: bytes, where: str) -> About:
    """Return what `history.json` says.

    Raises:
        CheckpointError: another kind of file, or a newer version.
    """
    try:
        value = parse_json(text, where)
        if value.get("format") != KIND:
            raise ValueError(f'its "format" is not "{KIND}"')
        check_version(value.get("format_version"), where)
        files = {str(name): (str(entry[0]), int(entry[1])) for name, entry in value["files"].items()}
        if any("/" in name or "\\" in name or name.startswith(".") for name in files):
            raise ValueError("a file's name leads out of the folder")
        return About(
            config=config_from_hf(value["config"], f"{where}: config"),
            tokenizer_sha256=str(value["tokenizer_sha256"]),
            run=dict(value["run"]),
            files=files,
            base_error=float(value["base_error"]),
            max_reads=int(value["max_reads"]),
            code_version=str(value["code_version"]),
        )
    except (FormatError, ConfigError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{where} is no description of a history: {error}") from error


def parse_catalogue(text: bytes, where: str) -> Catalogue:
    """Return what `index.json` lists.

    Raises:
        CheckpointError: not an index, or a newer version.
    """
    try:
        value = parse_json(text, where)
        check_version(value.get("format_version"), where)
        rows = tuple(_row(item) for item in value["checkpoints"])
        steps = [row.step for row in rows]
        if steps != sorted(set(steps)):
            raise ValueError("its steps do not rise")
        return Catalogue(str(value["history_sha256"]), rows)
    except (FormatError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where} is no index of a history: {error}") from error


def _row(value: Mapping[str, Any]) -> Row:
    row = Row(**value)
    is_sound = (
        type(row.step) is int
        and type(row.tokens) is int
        and type(row.num_bytes) is int
        and min(row.step, row.tokens, row.num_bytes) >= 0
        and isinstance(row.stage, str)
        and isinstance(row.losses, dict)
        and row.precision in PRECISIONS
        and len(row.manifest_sha256) == 64
        and row.manifest_sha256.isalnum()
    )
    if not is_sound:
        raise ValueError(f"the entry of step {row.step!r:.20} is damaged")
    return row
