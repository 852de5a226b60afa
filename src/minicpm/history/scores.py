"""What evaluations say of a history's checkpoints: `scores.json`, beside the index.

A score belongs to weights, not to a step's number: one of weights that the history no longer has at that step is not
shown, and one of a checkpoint that was only coded anew is. What this leaves out: evaluating (`eval`), drawing
(`picture`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minicpm.errors import CheckpointError, FormatError
from minicpm.formats.json_file import parse_json
from minicpm.history.catalogue import PRECISIONS, Precision
from minicpm.history.manifest import check_version
from minicpm.history.place import Folder, MissingFileError, Place
from minicpm.history.reading import History
from minicpm.history.store import disk_errors

SCORES = "scores.json"
KIND = "minicpm scores"
FORMAT_VERSION = 1
_LOCK = ".scores.lock"
_SHOWN_CHARACTERS = 12


@dataclass(frozen=True)
class Setting:
    """All that a score depends on besides the weights: scores of one setting can be compared.

    Attributes:
        task: its name.
        form: how a row is put.
        protocol: of the evaluation.
        shots: examples in front.
        num_rows: rows that were scored.
        precision: of the checkpoints.
        runtime: what computed.
        judge: who rated dialogues; empty where nobody did.
        version: of the task.
        form_digest: of the form's definition.
        data_sha256: of the rows.
    """

    task: str
    form: str
    protocol: str
    shots: int
    num_rows: int
    precision: Precision
    runtime: str
    judge: str
    version: int
    form_digest: str
    data_sha256: str


@dataclass(frozen=True)
class Score:
    """What one evaluation said of one checkpoint.

    Attributes:
        step: of the checkpoint.
        manifest_sha256: of its manifest, as it was coded then.
        weights_sha256: of all its tensors.
        setting: how it was evaluated.
        figures: metric → (value, standard error or None); the first is what the form is known by.
    """

    step: int
    manifest_sha256: str
    weights_sha256: str
    setting: Setting
    figures: Mapping[str, tuple[float, float | None]]

    @property
    def metric(self) -> str:
        """What the form is known by."""
        return next(iter(self.figures))

    @property
    def value(self) -> float:
        """The figure that the form is known by."""
        return self.figures[self.metric][0]

    @property
    def stderr(self) -> float | None:
        """Its standard error; None of a single row."""
        return self.figures[self.metric][1]

    @property
    def text(self) -> str:
        """The figure as a person reads it."""
        return f"{self.value:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")

    @property
    def is_of(self) -> tuple[str, Setting]:
        """What tells it from every other score."""
        return self.weights_sha256, self.setting


def read_scores(place: Place) -> list[Score]:
    """Return the scores beside a history, none where there are none.

    Raises:
        CheckpointError: the file is damaged, of a newer version, or cannot be read.
    """
    try:
        text = place.read(SCORES)
    except MissingFileError:
        return []
    return parse_scores(text, f"{place.name}/{SCORES}")


def parse_scores(text: bytes, where: str) -> list[Score]:
    """Return the scores in a file.

    Raises:
        CheckpointError: it is no such file, or of a newer version.
    """
    try:
        value = parse_json(text, where)
        if value.get("format") != KIND:
            raise ValueError(f'its "format" is not "{KIND}"')
        check_version(value.get("format_version"), where)
        return [_score(item) for item in value["scores"]]
    except (FormatError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where} holds no scores: {error}; remove it to evaluate anew") from error


def _score(item: Mapping[str, Any]) -> Score:
    step, figures = item["step"], item["figures"]
    setting = Setting(**{field.name: item[field.name] for field in _FIELDS})
    manifest, weights = item["manifest_sha256"], item["weights_sha256"]
    kinds = [(getattr(setting, f.name), int if f.type == "int" else str) for f in _FIELDS]
    kinds += [(step, int), (manifest, str), (weights, str)]
    if not figures or setting.precision not in PRECISIONS or not all(isinstance(v, kind) for v, kind in kinds):
        raise ValueError(f"the entry of step {step!r:.20} is damaged")
    return Score(step, manifest, weights, setting, {str(name): _figure(*pair) for name, pair in figures.items()})


_FIELDS = dataclasses.fields(Setting)


def _figure(value: object, stderr: object) -> tuple[float, float | None]:
    if not isinstance(value, int | float) or not isinstance(stderr, int | float | None):
        raise ValueError(f"{value!r:.20} ± {stderr!r:.20} is no figure")
    return float(value), None if stderr is None or math.isnan(stderr) else float(stderr)


def scores_to_json(scores: Iterable[Score]) -> bytes:
    """Return the file's content, a line for each score."""
    lines = []
    for score in scores:
        value = dataclasses.asdict(score)
        setting = value.pop("setting")
        lines.append(json.dumps({**value, **setting}, ensure_ascii=False, allow_nan=False))
    head = json.dumps({"format": KIND, "format_version": FORMAT_VERSION})
    return (head[:-1] + ', "scores": [\n' + ",\n".join(lines) + "\n]}\n").encode()


def add_scores(folder: Folder, scores: Iterable[Score]) -> None:
    """Put scores beside the history in `folder`, each in the place of an earlier one of the same; whole or not at all.

    Raises:
        CheckpointError: the file there is damaged, or the disk does not take the new one.
    """
    with disk_errors(folder.path), _taking_turns(folder):
        folder.write(SCORES, scores_to_json(merged(read_scores(folder), scores)))


def merged(scores: Iterable[Score], more: Iterable[Score]) -> list[Score]:
    """Return both by step, the later ones in the place of earlier ones of the same."""
    found = {score.is_of: score for score in (*scores, *more)}
    return sorted(found.values(), key=lambda score: score.step)


def current_scores(history: History) -> list[Score]:
    """Return the scores of weights that the history has at their steps.

    Raises:
        CheckpointError: they cannot be read.
    """
    found = []
    digests: dict[int, str] = {}
    for score in read_scores(history.place):
        if score.step not in history:
            continue
        row = history.row(score.step)
        if row.manifest_sha256 != score.manifest_sha256:
            # Thinning codes the same weights anew; a run that was resumed earlier has others.
            if score.step not in digests:
                digests[score.step] = history.manifest(row).weights_sha256
            if digests[score.step] != score.weights_sha256:
                continue
        found.append(score)
    return found


def by_setting(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """Return one series for each setting, by rising step, under a label that says what tells it from the others."""
    groups: dict[Setting, list[Score]] = {}
    for score in sorted(scores, key=lambda score: score.step):
        groups.setdefault(score.setting, []).append(score)
    found = {}
    for setting, group in groups.items():
        others = [other for other in groups if other.task == setting.task]
        differing = [f.name for f in _FIELDS if len({getattr(other, f.name) for other in others}) > 1]
        words = [f"{_WORDS.get(name, name)} {str(getattr(setting, name))[:_SHOWN_CHARACTERS]}" for name in differing]
        found[", ".join([f"{setting.task} {group[0].metric}", *words])] = group
    return found


_WORDS = {"num_rows": "n", "form_digest": "form's hash", "data_sha256": "data"}


@contextlib.contextmanager
def _taking_turns(folder: Folder) -> Iterator[None]:
    """Let one process change the file at a time; the history's own lock may be held for days by a training."""
    descriptor = os.open(folder.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
