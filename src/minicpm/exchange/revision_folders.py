"""Checkpoints that lie as model folders, one a revision → a history.

    SOURCE/step1000/config.json …                         as Pythia names its branches
    SOURCE/stage1-step1000-tokens4B/config.json …         as OLMo does
    SOURCE/step_001000/manifest.json …                    as `minicpm pretrain` saves them: with lr, losses and the run
    SOURCE/refs/step1000, SOURCE/snapshots/HASH/…         a repository of the hub's cache

The name says step, stage and tokens; what it does not say stays 0. What this leaves out: fetching, and architectures
that `formats` does not read (Pythia's own and OLMo's among them).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm.errors import CheckpointError
from minicpm.exchange.source import TOKENIZER_FILES
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.history import About, Facts, HistoryWriter, Row
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.fingerprint import fingerprint
from minicpm.train import checkpoint as saved

_NAME = re.compile(r"(?:(stage\d+)-)?(?:[\w.]+-)*?step[_-]?(\d{1,12})(?:-tokens(\d+(?:\.\d+)?)([KMBT]))?")
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_UNKNOWN_STAGE = "pretraining"


@dataclass(frozen=True)
class Revision:
    """A model folder and what its name says."""

    name: str
    folder: Path
    step: int
    stage: str
    tokens: int

    def facts(self) -> Facts:
        """Return where it stands: as its own manifest says, else as its name does."""
        labels = {"imported_from": self.name}
        if not (self.folder / saved.MANIFEST).is_file():
            return Facts(self.step, tokens=self.tokens, stage=self.stage, labels=labels)
        manifest = saved.read_manifest(self.folder)
        if manifest.step != self.step:
            raise CheckpointError(f"{self.folder} holds the checkpoint of step {manifest.step}")
        return Facts(
            self.step, tokens=manifest.tokens, stage=manifest.stage, lr=manifest.lr, losses=dict(manifest.losses),
            seed=manifest.seed, parent=manifest.parent, labels=labels,
        )  # fmt: skip


def parse_revision(name: str, folder: Path) -> Revision | None:
    """Return what a revision's name says, None where it names no step."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    stage, step, tokens, unit = match.groups()
    count = round(float(tokens) * _UNITS[unit]) if tokens else 0
    return Revision(name, folder, int(step), stage or _UNKNOWN_STAGE, count)


def find_revisions(source: Path, only: str = "*") -> list[Revision]:
    """Return the checkpoints of a folder by rising step, those whose names match `only` (`stage1-*`).

    Raises:
        CheckpointError: there are none, or two of one step.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder; give the one with the checkpoints")
    refs = source / "refs"
    named = [(path.name, path) for path in source.iterdir() if path.is_dir()]
    if refs.is_dir():
        named = [(path.name, source / "snapshots" / path.read_text().strip()) for path in refs.iterdir()]
    read = (parse_revision(name, folder) for name, folder in named if fnmatch.fnmatchcase(name, only))
    found: dict[int, Revision] = {}
    for revision in sorted((r for r in read if r is not None), key=lambda r: (r.step, r.name)):
        twin = found.setdefault(revision.step, revision)
        if twin is not revision:
            raise CheckpointError(
                f"{source}: {twin.name} and {revision.name} are both of step {revision.step}; take one kind with "
                f'--only, such as "stage1-*"'
            )
        if not (revision.folder / "config.json").is_file():
            raise CheckpointError(f"{revision.folder} ({revision.name}) has no config.json; it is not whole")
    if not found:
        raise CheckpointError(
            f"{source} holds no checkpoints: neither files pytorch_model.NNNNN nor folders or revisions such as "
            f"step1000 or stage1-step1000-tokens4B{'' if only == '*' else f' that match {only}'}"
        )
    return list(found.values())


def import_revisions(
    source: Path, out: Path, only: str = "*", say: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Make the history at `out` hold every checkpoint of `source`, and return their rows.

    The first is read in any case; steps that the history has already are not written again.

    Raises:
        CheckpointError: see `find_revisions`; a checkpoint of another network, or a disk that is full.
        FormatError: a checkpoint that cannot be read, or of an architecture that is not ours.
    """
    revisions = find_revisions(source, only)
    config = open_checkpoint(revisions[0].folder).config
    rows = []
    with _open_history(revisions[0], source, out) as writer:
        for index, revision in enumerate(revisions):
            if revision.step not in writer.rows:
                say(f"{index + 1} of {len(revisions)}: {revision.name}")
                checkpoint = open_checkpoint(revision.folder)
                if checkpoint.config.weight_shapes() != config.weight_shapes():
                    raise CheckpointError(f"{revision.name} is of another network than {revisions[0].name}")
                writer.append(revision.facts(), checkpoint.weights)
            rows.append(writer.rows[revision.step])
    return rows


def _open_history(first: Revision, source: Path, out: Path) -> HistoryWriter:
    folder = first.folder
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    digest = fingerprint(Tokenizer.from_folder(folder)) if files else ""
    run: dict[str, Any] = {"imported_from": source.name}
    if (folder / saved.MANIFEST).is_file():
        run |= saved.read_manifest(folder).run
    return HistoryWriter(out, About(open_checkpoint(folder).config, digest, run), files)
