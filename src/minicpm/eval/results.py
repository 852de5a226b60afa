"""What a run leaves in its folder, so that it can be continued, compared and believed.

    FOLDER/results.json                    model, protocol, data hashes, figures: written last, whole
    FOLDER/samples/TASK.FORM.jsonl         a header line, then one line per row, appended as rows are done

A sample file of another model, task version, form or data is never continued.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm.data.atomic import new_file, write_json
from minicpm.errors import EvalError
from minicpm.eval.judge import Sample
from minicpm.eval.statistics import Figure

FORMAT = 1
RESULTS = "results.json"


@dataclass(frozen=True)
class Scoring:
    """One form of one task on one model: everything that its figures depend on, and the figures."""

    task: str
    version: int
    form: str
    form_digest: str
    metric: str
    shots: int
    mode: str
    origin: str
    sha256: str
    num_rows: int
    figures: tuple[Figure, ...]


class SampleFile:
    """The samples of one scoring, on disk."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Open the file at `path` for `header`, or begin it.

        Raises:
            EvalError: it holds samples of something else, or is damaged.
        """
        self.path = path
        self.done: dict[int, Sample] = {}
        header = {"format": FORMAT, **header}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            whole = self._read(header)
            # A line that was cut off by the end of the process is dropped.
            with path.open("r+b") as file:
                file.truncate(whole)
        else:
            with new_file(path) as file:
                file.write((json.dumps(header, ensure_ascii=False) + "\n").encode())

    def append(self, samples: Iterable[Sample]) -> None:
        """Add `samples`, on disk when this returns."""
        lines = []
        for sample in samples:
            self.done[sample.index] = sample
            lines.append(json.dumps(dataclasses.asdict(sample), ensure_ascii=False) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def _read(self, header: dict[str, Any]) -> int:
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    value = json.loads(line)
                    if number > 1:
                        self.done[value["index"]] = Sample(**value)
                except (ValueError, TypeError, KeyError) as error:
                    raise EvalError(
                        f"{self.path}:{number} is damaged ({error}); delete the file to begin it anew"
                    ) from error
                if number == 1 and value != header:
                    differing = sorted(k for k in header if not isinstance(value, dict) or value.get(k) != header[k])
                    raise EvalError(
                        f"{self.path} holds samples of another run: {', '.join(differing)} differ; "
                        "give another --out, or delete it"
                    )
                whole += len(line)
        if not whole:
            raise EvalError(f"{self.path} has no first line; delete the file to begin it anew")
        return whole


def write_results(folder: Path, model: dict[str, Any], protocol: str, scorings: Iterable[Scoring]) -> Path:
    """Write `results.json` whole and return its path."""
    data = {
        "format": FORMAT,
        "model": model,
        "protocol": protocol,
        "scorings": [dataclasses.asdict(s) for s in scorings],
    }
    path = folder / RESULTS
    write_json(path, _without_nan(data))
    return path


def read_results(folder: Path) -> tuple[dict[str, Any], list[Scoring]]:
    """Return the header and the scorings of the run in `folder`.

    Raises:
        EvalError: it has none, or of a newer format.
    """
    path = folder / RESULTS
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] > FORMAT:
            raise EvalError(f"{path} is of format {data['format']}, this version reads {FORMAT}; upgrade minicpm")
        scorings = [
            Scoring(**item | {"figures": tuple(_figure(figure) for figure in item["figures"])})
            for item in data.pop("scorings")
        ]
    except OSError as error:
        raise EvalError(
            f"{folder} holds no finished evaluation (no results.json); run `minicpm eval … --out {folder}`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise EvalError(f"{path} is no result of `minicpm eval`: {error}") from error
    return data, scorings


def read_samples(folder: Path, task: str, form: str) -> list[Sample]:
    """Return the samples of one scoring, by row.

    Raises:
        EvalError: they are not there.
    """
    path = sample_path(folder, task, form)
    if not path.is_file():
        raise EvalError(f"{folder} has no samples of {task} ({form}); it was run without that task")
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return sorted((Sample(**json.loads(line)) for line in lines), key=lambda sample: sample.index)


def sample_path(folder: Path, task: str, form: str) -> Path:
    """Return where the samples of one scoring stand."""
    return folder / "samples" / f"{Path(task).stem}.{form}.jsonl"


def _figure(values: dict[str, Any]) -> Figure:
    return Figure(**values | {"stderr": math.nan if values["stderr"] is None else values["stderr"]})


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
