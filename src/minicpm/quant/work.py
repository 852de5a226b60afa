"""The folder in which rounded layers wait until the whole model is written, so that an interrupted run goes on.

One GGUF file per finished part, under HF names; a part that is not whole is not there. What was made under other
settings, of another source, or with other text is thrown away. What this leaves out: hidden states, which the finished
layers give again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from minicpm.errors import CheckpointError
from minicpm.formats.gguf_read import open_gguf
from minicpm.formats.gguf_write import write_gguf
from minicpm.formats.json_file import write_json
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry

_PLAN = "plan.json"
_ERRORS = "minicpm.errors"


class WorkFolder:
    """Finished parts of one quantization."""

    def __init__(self, path: Path, plan: Mapping[str, object]) -> None:
        """Open the folder for `plan`, which holds everything that the result depends on; made anew if it differs.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.path = path
        try:
            if not self._is_of(plan):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
                write_json(path / _PLAN, plan)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error

    def _is_of(self, plan: Mapping[str, object]) -> bool:
        try:
            kept: object = json.loads((self.path / _PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(kept == json.loads(json.dumps(plan)))

    def has(self, part: str) -> bool:
        """Whether `part` is finished."""
        return self._file(part).exists()

    def put(self, part: str, weights: Mapping[str, Weight], errors: Mapping[str, float]) -> None:
        """Keep the weights of `part` and the errors that rounding made in it; on disk when this returns."""
        entries = {name: WeightEntry.of(weight) for name, weight in weights.items()}
        write_gguf(self._file(part), {_ERRORS: json.dumps(dict(errors))}, entries)

    def weights(self, part: str) -> dict[str, Weight]:
        """Return the weights of `part`, views of its file."""
        file = open_gguf(self._file(part))
        return {name: file.weight(name) for name in file.tensors}

    def errors(self, part: str) -> dict[str, float]:
        """Return the relative error of each matrix of `part`."""
        found: dict[str, float] = json.loads(str(open_gguf(self._file(part)).metadata[_ERRORS]))
        return found

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, part: str) -> Path:
        return self.path / f"{part}.gguf"
