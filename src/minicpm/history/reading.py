"""Reading a history: any step, any tensor, at the precision that is asked for.

    history = minicpm.History("runs/nano/history")            or https://…, s3://…, hf://…
    history[4000]["model.layers.3.mlp.up_proj.weight"]        float32; only its own byte ranges are read
    history.at(tokens=1e9).state_dict()                       the nearest checkpoint, every tensor
    history.at(4000, precision="base")                        a few bits a weight: to look at, to evaluate, to chat
    history.load_model(4000)                                  a torch model

What this leaves out: writing (`store`).
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.formats.block_type import Floats
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import LazyWeights, WeightEntry
from minicpm.history.catalogue import OBJECTS, PRECISIONS, Precision, Row, read_catalogue
from minicpm.history.decoding import Decoder
from minicpm.history.manifest import Manifest, parse_manifest
from minicpm.history.place import Place, open_place

if TYPE_CHECKING:
    from minicpm.model.minicpm import MiniCPM

_NUM_NEAREST = 4
# Of a large model one takes megabytes.
_NUM_MANIFESTS = 32


class Snapshot(Mapping[str, Floats]):
    """One checkpoint, read to one precision; a mapping of HF names to float32 arrays that are read when asked for.

    Attributes:
        row: its line of the index.
        config: the network.
        precision: "base" or "exact".
    """

    def __init__(self, history: History, row: Row, precision: Precision) -> None:
        self.row = row
        self.config = history.config
        self.precision = precision
        self._history = history
        self._where = f"{history.place.name} step {row.step}"

    @property
    def manifest(self) -> Manifest:
        """Where it stands, and where its bytes lie."""
        return self._history.manifest(self.row)

    @property
    def step(self) -> int:
        """Updates made."""
        return self.row.step

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.row.tokens

    @property
    def stage(self) -> str:
        """The stage of the last update."""
        return self.row.stage

    def __repr__(self) -> str:
        return f"<{self._where}, {self.stage}, {self.precision}>"

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.tensors)

    def __len__(self) -> int:
        return len(self.manifest.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.manifest.tensors

    def __getitem__(self, name: str) -> Floats:
        if name not in self.manifest.tensors:
            raise KeyError(name)
        return self.weight(name).decode()

    def weight(self, name: str) -> Weight:
        """Return a tensor as it was trained, in its own dtype.

        Raises:
            CheckpointError: no such tensor, or the history is damaged or out of reach.
        """
        entry = self.manifest.tensors.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, self, n=2) or list(self)[:2]
            raise CheckpointError(f"{self._where} has no tensor {name!r}; there are {', '.join(near)} …")
        return self._history.decoder.weight(name, entry, self.precision == "exact", self._where)

    def weights(self) -> LazyWeights:
        """Return every tensor in its own dtype, each read when asked for."""
        return LazyWeights(
            {
                name: WeightEntry(entry.shape, entry.block_type, partial(self.weight, name))
                for name, entry in self.manifest.tensors.items()
            }
        )

    def state_dict(self) -> dict[str, Floats]:
        """Return every tensor as float32, which holds bfloat16 and float16 exactly."""
        return {name: self[name] for name in self}

    def load_model(self, **settings: Any) -> MiniCPM:
        """Return a torch model in the dtype of the run; `settings` go to `minicpm.model.load_model`."""
        from minicpm.model.loading import load_model

        return load_model(self.config, self.weights(), **settings)


class History:
    """The checkpoints of one run, by step.

    Args:
        place: the folder `history` of a run, or a run's folder, or a URL, or what was opened of them.
        cache_bytes: memory for what was decoded last.

    Raises:
        CheckpointError: no history there, one of a newer version, a damaged one, or one out of reach.
    """

    def __init__(self, place: str | os.PathLike[str] | Place, *, cache_bytes: int = 256 << 20) -> None:
        self.place = _open(place) if isinstance(place, str | os.PathLike) else place
        self.decoder = Decoder(self.place, cache_bytes)
        self._manifests: dict[str, Manifest] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look again: a training may have added checkpoints."""
        self.about, self.catalogue = read_catalogue(self.place)
        self._rows = {row.step: row for row in self.catalogue.rows}

    @property
    def config(self) -> ModelConfig:
        """The network."""
        return self.about.config

    @property
    def steps(self) -> list[int]:
        """The steps that are there."""
        return list(self._rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        """What the index says of each, by step."""
        return self.catalogue.rows

    def __repr__(self) -> str:
        return f"<history {self.place.name}, {len(self)} checkpoints>"

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Snapshot]:
        return (self[step] for step in self.steps)

    def __contains__(self, step: object) -> bool:
        return step in self._rows

    def __getitem__(self, step: int) -> Snapshot:
        return self.at(step)

    def at(self, step: int | None = None, *, tokens: float | None = None, precision: Precision = "exact") -> Snapshot:
        """Return the checkpoint of `step`, or the one nearest to `tokens` seen.

        Raises:
            CheckpointError: no such step (with the nearest), a precision that is not there, or a damaged manifest.
        """
        if precision not in PRECISIONS:
            raise CheckpointError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
        if step is not None and tokens is None:
            row = self.row(step)
        elif tokens is not None and step is None:
            self._require_any()
            row = min(self.rows, key=lambda r: abs(r.tokens - tokens))
        else:
            raise CheckpointError("give either a step or tokens=")
        if precision == "exact" and row.precision != "exact":
            raise CheckpointError(
                f"{self.place.name}: of step {row.step} only the base layer was published; ask for precision base"
            )
        return Snapshot(self, row, precision)

    def row(self, step: int) -> Row:
        """Return what the index says of `step`.

        Raises:
            CheckpointError: it is not there; with the nearest that are.
        """
        if step not in self._rows:
            self._require_any()
            near = sorted(sorted(self._rows, key=lambda s: abs(s - step))[:_NUM_NEAREST])
            raise CheckpointError(
                f"{self.place.name} has no checkpoint of step {step}; the nearest are {', '.join(map(str, near))}"
            )
        return self._rows[step]

    def _require_any(self) -> None:
        if not self._rows:
            raise CheckpointError(f"{self.place.name} holds no checkpoint yet")

    def manifest(self, row: Row) -> Manifest:
        """Return the manifest of a row of the index.

        Raises:
            CheckpointError: it is missing, damaged, or of another step.
        """
        if row.manifest not in self._manifests:
            text = self.place.read(row.manifest)
            where = f"{self.place.name}/{row.manifest}"
            if hashlib.sha256(text).hexdigest() != row.manifest_sha256:
                raise CheckpointError(f"{where} was changed: its hash is not the one in the index")
            manifest = parse_manifest(text, where)
            if manifest.facts.step != row.step:
                raise CheckpointError(f"{where} is the manifest of step {manifest.facts.step}")
            if len(self._manifests) >= _NUM_MANIFESTS:
                self._manifests.pop(next(iter(self._manifests)))
            self._manifests[row.manifest] = manifest
            return manifest
        return self._manifests[row.manifest]

    def stage(self, name: str) -> list[Snapshot]:
        """Return the checkpoints of a stage: warmup, stable, decay or tail.

        Raises:
            CheckpointError: there are none; with the stages that are there.
        """
        steps = [row.step for row in self.rows if row.stage == name]
        if not steps:
            known = ", ".join(dict.fromkeys(row.stage for row in self.rows))
            raise CheckpointError(f"{self.place.name} has no checkpoint of stage {name!r}; there are {known or 'none'}")
        return [self[step] for step in steps]

    def iter_tensor(self, name: str, *, precision: Precision = "exact") -> Iterator[tuple[int, Floats]]:
        """Yield (step, float32 array) of one tensor through all steps, each decoded from the one before."""
        for step in self.steps:
            yield step, self.at(step, precision=precision).weight(name).decode()

    def load_model(self, step: int, *, precision: Precision = "exact", **settings: Any) -> MiniCPM:
        """Return the torch model of `step`; `settings` go to `minicpm.model.load_model`."""
        return self.at(step, precision=precision).load_model(**settings)

    def files(self) -> dict[str, bytes]:
        """Return the small files that make a checkpoint a model folder: the tokenizer's.

        Raises:
            CheckpointError: one is missing or damaged.
        """
        found = {}
        for name, (digest, _) in self.about.files.items():
            content = self.place.read(f"{OBJECTS}/{digest}")
            if hashlib.sha256(content).hexdigest() != digest:
                raise CheckpointError(f"{self.place.name}: {name} (object {digest[:16]}…) was changed")
            found[name] = content
        return found


def _open(path_or_url: str | os.PathLike[str]) -> Place:
    text = os.fspath(path_or_url)
    own = os.path.join(text, "history")
    return open_place(own if os.path.isfile(os.path.join(own, "history.json")) else text)
