"""Which text every step of a run saw: worked out again, because a batch is a pure function of (seed, step).

What this leaves out: making token shards; those that the run read must still be there, and are held to their hashes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm import config as configuration
from minicpm.data.batches import Batch, BatchStream
from minicpm.data.opening import check_identity, kept_shards, sources_of
from minicpm.errors import CheckpointError, DataError
from minicpm.formats.atomic_file import atomic_file
from minicpm.history.naming import open_history
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.fingerprint import fingerprint
from minicpm.train import schedule as schedules
from minicpm.train.pretrain_config import PretrainConfig

FORMAT = "minicpm data order"
FIELDS = ("row", "column", "length", "source", "document", "offset", "epoch")


@dataclass(frozen=True)
class DataOrder:
    """The batches of a run: `data` is the content hash of every source."""

    config: PretrainConfig
    tokenizer: Tokenizer
    stream: BatchStream
    data: dict[str, str]

    def batch(self, step: int) -> Batch:
        """Return the global batch of update `step`.

        Raises:
            DataError: no batch made that step.
        """
        total = self.config.schedule.total_steps
        if not 1 <= step <= total:
            why = "the start, which no batch made" if step == 0 else "not of this run"
            raise DataError(f"step {step} is {why}; the updates are 1 to {total}")
        sizes = self.config.batch
        return self.stream.batch(sizes.sequences_before(step), sizes.at(step))

    def write(self, path: Path, first_step: int, last_step: int) -> None:
        """Write the order of the steps as JSON lines: a header, then each step with its segments; whole or not at all.

        A segment is [row, column, length, source, document, offset, epoch]: `length` tokens of a document from token
        `offset` on, at `column` of the batch's `row`.

        Raises:
            DataError: no batch made a step.
            CheckpointError: the disk does not take it.
        """
        self.batch(first_step), self.batch(last_step)
        header = {
            "format": FORMAT,
            "seed": self.config.loop.seed,
            "sequence_length": self.config.batch.sequence_length,
            "tokenizer_sha256": fingerprint(self.tokenizer),
            "data": self.data,
            "segment": FIELDS,
        }
        with atomic_file(path) as file:
            file.write(_line(header))
            for step in range(first_step, last_step + 1):
                file.write(_line(self._describe(step)))

    def _describe(self, step: int) -> dict[str, Any]:
        batch = self.batch(step)
        return {
            "step": step,
            "stage": schedules.stage(self.config.schedule, step),
            "first_row": batch.first_row,
            "rows": len(batch.input_ids),
            "segments": [list(reference) for reference in batch.references],
        }


def open_order(run: Path) -> DataOrder:
    """Return the data order of the run in a folder.

    Raises:
        CheckpointError: there is no run, or it does not say in which order its data came.
        DataError: its token shards or its tokenizer are gone, or hold something else now.
    """
    facts = recorded_facts(run)
    config = configuration.build(PretrainConfig, dict(facts["config"]))
    if not (run / "tokenizer").is_dir():
        raise DataError(f"{run / 'tokenizer'} is gone: without the run's tokenizer its batches cannot be worked out")
    tokenizer = Tokenizer.from_folder(run / "tokenizer")
    cache = Path(config.corpus.cache) if config.corpus.cache else run / "data"
    shards = {name: kept_shards(mix, cache, fingerprint(tokenizer)) for name, mix in sources_of(config.stages).items()}
    recorded = dict(facts.get("data", {}))
    check_identity(shards, recorded)
    stream = BatchStream(config.spans(), shards, config.batch.sequence_length, seed=config.loop.seed)
    return DataOrder(config, tokenizer, stream, recorded)


def recorded_facts(run: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run (`config`) and its data's hashes (`data`), the newest that it has.

    Raises:
        CheckpointError: it has none.
    """
    path = run / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        facts = dict(open_history(str(run)).about.run)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise CheckpointError(
            f"{run} does not say in which order its data came: it was imported, or trained by another program"
        )
    return facts


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
