"""The published checkpoints of MiniCPM-2B → a history: files `pytorch_model.NNNNN` in one folder, one for each step.

Each is read by torch with tensors alone allowed. The files say nothing of where they stand: stage and rate are those of
the released schedule, the tokens those of its batch. What this leaves out: fetching the files.

Source: the model card of openbmb/MiniCPM-2B-history: stable to 261,000, decay to 279,500, the rest was not used.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from minicpm.errors import CheckpointError
from minicpm.exchange.source import TOKENIZER_FILES
from minicpm.formats.checkpoint import Checkpoint, open_checkpoint
from minicpm.history import About, Facts, HistoryWriter, Row
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.fingerprint import fingerprint
from minicpm.train import schedule as schedules
from minicpm.train.schedule import ScheduleConfig

_FILE = re.compile(r"pytorch_model\.(?:bin\.)?(\d{1,12})(?:\.bin)?")
_STABLE_STEPS, _DECAY_STEPS, _HALF_LIFE = 261_000, 18_500, 5_000
_BATCH_SEQUENCES, _SEQUENCE_LENGTH = 960, 4096


def released_schedule(last_step: int) -> ScheduleConfig:
    """Return the released run's schedule, long enough for `last_step`; its warm-up's length was never published."""
    decay_end = _STABLE_STEPS + _DECAY_STEPS
    total = max(decay_end, last_step)
    return ScheduleConfig(
        total_steps=total, lr=0.01, kind="wsd-exp", warmup=0.0, decay=_DECAY_STEPS, tail=total - decay_end,
        half_life=_HALF_LIFE,
    )  # fmt: skip


def released_facts(step: int, file: str) -> Facts:
    """Return where a published checkpoint stands."""
    schedule = released_schedule(step)
    return Facts(
        step=step,
        tokens=step * _BATCH_SEQUENCES * _SEQUENCE_LENGTH,
        stage=schedules.stage(schedule, step),
        lr=schedules.lr(schedule, step),
        batch_sequences=_BATCH_SEQUENCES,
        labels={"imported_from": file},
    )


def import_published(source: Path, out: Path, say: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Make the history at `out` hold every checkpoint in the folder `source`, and return their rows.

    The first file is read in any case; steps that the history has already are not written again.

    Raises:
        CheckpointError: no such files or no config.json, two of one step, or a disk that is full.
        FormatError: a file that holds more than tensors.
    """
    files = find_files(source)
    rows = []
    writer: HistoryWriter | None = None
    try:
        for index, (step, file) in enumerate(files.items()):
            if writer is not None and step in writer.rows:
                rows.append(writer.rows[step])
                continue
            with tempfile.TemporaryDirectory(prefix="minicpm-import-") as folder:
                checkpoint = _open(source, file, Path(folder))
                writer = writer or _open_history(source, out, checkpoint)
                if step not in writer.rows:
                    say(f"{index + 1} of {len(files)}: {file.name}")
                    writer.append(released_facts(step, file.name), checkpoint.weights)
                rows.append(writer.rows[step])
    finally:
        if writer is not None:
            writer.close()
    return rows


def has_files(source: Path) -> bool:
    """Return whether a folder holds such files."""
    return source.is_dir() and any(_FILE.fullmatch(path.name) and path.is_file() for path in source.iterdir())


def find_files(source: Path) -> dict[int, Path]:
    """Return the checkpoint files of a folder by rising step.

    Raises:
        CheckpointError: there are none, or two of one step.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder; give the one with the files pytorch_model.NNNNN")
    found: dict[int, Path] = {}
    for path in sorted(source.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match is None or not path.is_file():
            continue
        step = int(match[1])
        if step in found:
            raise CheckpointError(f"{path} and {found[step].name} are both of step {step}; remove one")
        found[step] = path
    if not found:
        raise CheckpointError(f"{source} holds no file pytorch_model.NNNNN, such as pytorch_model.260000")
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json; put the model's beside its files")
    return dict(sorted(found.items()))


def _open(source: Path, file: Path, folder: Path) -> Checkpoint:
    """Return one checkpoint as if it alone were the model folder, which is how its readers used it."""
    (folder / "config.json").symlink_to((source / "config.json").resolve())
    (folder / "pytorch_model.bin").symlink_to(file.resolve())
    return open_checkpoint(folder, allow_pickle=True)


def _open_history(source: Path, out: Path, checkpoint: Checkpoint) -> HistoryWriter:
    files = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    digest = fingerprint(Tokenizer.from_folder(source)) if files else ""
    run = {"imported_from": source.name, "schedule": "released", "seed": None}
    return HistoryWriter(out, About(checkpoint.config, digest, run), files)
