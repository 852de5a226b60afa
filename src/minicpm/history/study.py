"""A run as its page shows it: curves, layers through the steps, samples, branches, manifests; plain data for JSON.

What was computed stays, so that a step costs once. What this leaves out: answering a browser (`page_server`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minicpm.errors import CheckpointError
from minicpm.history.catalogue import ABOUT
from minicpm.history.difference import by_layer
from minicpm.history.naming import open_history
from minicpm.history.reading import History
from minicpm.history.scores import by_setting, current_scores

# Continues each prompt from the weights of a step.
Generate = Callable[[int, Sequence[str]], list[str]]
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
PROMPTS = ("The ", "Once upon a time", "def ")
# Points of a curve that a page draws, and neighbouring folders that are looked into for branches.
_NUM_POINTS, _NUM_NEIGHBOURS = 2000, 200


class Study:
    """What can be asked about one run; calls from several threads take turns.

    Args:
        run: a run's folder, a history's folder, or a URL.
        generate: makes samples that the run did not keep; None makes none.

    Raises:
        CheckpointError: there is no history, or it is damaged.
    """

    def __init__(self, run: str, generate: Generate | None = None) -> None:
        self.history = open_history(run)
        self._generate = generate
        self._folder = _run_folder(self.history)
        self._name = self.history.place.name.rstrip("/").removesuffix("/history").rpartition("/")[2]
        self._layers: dict[tuple[str, str], dict[str, Any]] = {}
        self._texts: dict[str, list[dict[str, Any]]] = {}
        self._lock, self._generation = threading.Lock(), threading.Lock()

    def overview(self) -> dict[str, Any]:
        """Return what the page begins with: checkpoints, curves, stages, branches; looks at the run again."""
        with self._lock:
            self.history.refresh()
            config = self.history.config
            train, heldout = self._curves()
            return {
                "name": self._name,
                "num_parameters": config.num_parameters().total,
                "num_layers": config.num_hidden_layers,
                "code_version": self.history.about.code_version,
                "checkpoints": [dataclasses.asdict(row) for row in self.history.rows],
                "train": train,
                "heldout": heldout,
                "scores": [
                    {"label": label, "points": [[s.step, s.value, s.stderr] for s in scores]}
                    for label, scores in by_setting(current_scores(self.history)).items()
                ],
                "branches": self._branches(),
                "can_generate": self._generate is not None,
            }

    def layers(self, step: int) -> dict[str, Any]:
        """Return norm, size of the update since the checkpoint before, and cosine to it, of each layer.

        Raises:
            CheckpointError: there is no such step, or it is damaged.
        """
        with self._lock:
            row = self.history.row(step)
            before = max((r for r in self.history.rows if r.step < step), key=lambda r: r.step, default=row)
            key = (row.manifest_sha256, before.manifest_sha256)
            if key not in self._layers:
                # A is this checkpoint, so that norms are its own; the size of the difference has no direction.
                here, there = (self.history.at(r.step, precision=r.precision) for r in (row, before))
                found = [
                    {"name": d.name, "norm": d.norm, "change": d.change, "cosine": d.cosine}
                    for d in by_layer(here, there)
                ]
                self._layers[key] = {
                    "step": step,
                    "previous": before.step if before is not row else None,
                    "layers": [{k: _shown(v) for k, v in d.items()} for d in found],
                }
            return self._layers[key]

    def manifest(self, step: int) -> dict[str, Any]:
        """Return a checkpoint's facts and its tensors.

        Raises:
            CheckpointError: there is no such step, or it is damaged.
        """
        with self._lock:
            row = self.history.row(step)
            manifest = self.history.manifest(row)
            tensors = [
                {"name": name, "type": entry.block_type, "shape": list(entry.shape), "sha256": entry.sha256}
                for name, entry in manifest.tensors.items()
            ]
            facts = dataclasses.asdict(manifest.facts)
            return facts | {"manifest_sha256": row.manifest_sha256, "bytes": row.num_bytes, "tensors": tensors}

    def samples(self, step: int) -> dict[str, Any]:
        """Return what the run continued its prompts with at `step`, or at the last time before that it did.

        Raises:
            CheckpointError: there is no such step.
        """
        with self._lock:
            row = self.history.row(step)
            if made := self._texts.get(row.manifest_sha256):
                return {"step": step, "samples": made}
            kept = [
                r for r in _json_lines(self._folder, SAMPLES) if r["step"] <= step and "prompt" in r and "text" in r
            ]
            last = max((r["step"] for r in kept), default=None)
            # A run that was resumed may have made a step's samples twice: the later ones are of the run that stays.
            texts = {r["prompt"]: r["text"] for r in kept if r["step"] == last}
            return {"step": last, "samples": [{"prompt": p, "text": t} for p, t in texts.items()]}

    def generate(self, step: int) -> dict[str, Any]:
        """Return samples made now from the weights of `step`; kept until the study ends.

        Raises:
            CheckpointError: there is no such step, or nothing that could make samples.
        """
        if self._generate is None:
            raise CheckpointError("samples cannot be made here: the history has no tokenizer or only base layers")
        with self._generation:
            with self._lock:
                row = self.history.row(step)
                loop = self.history.about.run.get("config", {}).get("loop", {})
                prompts = [p for p in loop.get("sample_prompts", ()) if isinstance(p, str) and p] or list(PROMPTS)
                is_made = row.manifest_sha256 in self._texts
            if not is_made:
                texts = self._generate(step, prompts)
                self._texts[row.manifest_sha256] = [
                    {"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)
                ]
        return self.samples(step)

    def _curves(self) -> tuple[list[list[Any]], list[list[Any]]]:
        """[step, loss, lr, stage] of the updates, and [step, bits per byte] of the held-out text."""
        rows = _json_lines(self._folder, METRICS)
        train = [[r["step"], r["loss"], r.get("lr"), r.get("stage")] for r in rows if _is_number(r.get("loss"))]
        if not train:
            marks = self.history.rows
            train = [[r.step, r.losses["train"], r.lr, r.stage] for r in marks if "train" in r.losses]
        name = "heldout_bits_per_byte"
        heldout = [[r["step"], r[name]] for r in rows if _is_number(r.get(name))]
        if not heldout:
            steps = {
                int(r.losses.get("heldout_step", r.step)): r.losses[name] for r in self.history.rows if name in r.losses
            }
            heldout = [[step, value] for step, value in steps.items()]
        return _thinned(sorted(train, key=lambda r: r[0])), _thinned(sorted(heldout))

    def _branches(self) -> list[dict[str, Any]]:
        """The run, what it came from, and the runs beside it that began in one of them."""
        found = [_branch(self._name, self.history)]
        if self._folder is None:
            return found
        for folder in itertools.islice(sorted(self._folder.parent.iterdir()), _NUM_NEIGHBOURS):
            if folder != self._folder and (folder / "history" / ABOUT).is_file():
                try:
                    found.append(_branch(folder.name, History(folder)))
                except CheckpointError:
                    continue  # its own page says what is wrong with it
        related, growing = {self._name}, True
        while growing:
            more = {b["name"] for b in found if b["parent"] in related} | {
                b["parent"] for b in found if b["name"] in related and b["parent"]
            }
            growing = not more <= related
            related |= more
        return [branch for branch in found if branch["name"] in related]


def _branch(name: str, history: History) -> dict[str, Any]:
    rows = history.rows
    parent = history.manifest(rows[0]).facts.parent if rows else None
    run, _, rest = (parent or "").rpartition("@")
    begin = rest.split(" ")[0]
    return {
        "name": name,
        "parent": run.rstrip("/").rpartition("/")[2] or None,
        "begin": int(begin) if begin.isdecimal() else None,
        "first": rows[0].step if rows else None,
        "last": rows[-1].step if rows else None,
        "stage": rows[-1].stage if rows else None,
        "loss": rows[-1].losses.get("train") if rows else None,
    }


def _run_folder(history: History) -> Path | None:
    path = Path(history.place.name)
    if "://" in history.place.name or not path.is_dir():
        return None
    path = path.resolve()
    return path.parent if path.name == "history" else path


def _json_lines(folder: Path | None, name: str) -> list[dict[str, Any]]:
    """The records of a file with a step; a line that a kill cut short is left out."""
    if folder is None or not (folder / name).is_file():
        return []
    rows = []
    with (folder / name).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows


def _shown(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thinned(points: list[list[Any]]) -> list[list[Any]]:
    """As many points as a screen can show, the last one among them."""
    stride = -(-len(points) // _NUM_POINTS) or 1
    kept = points[::stride]
    return kept if not points or kept[-1] is points[-1] else [*kept, points[-1]]
