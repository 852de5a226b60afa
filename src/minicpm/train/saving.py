"""Saving during a run: when a checkpoint is due, and what happens when the disk does not take it.

What this leaves out: the files themselves (`checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicpm.errors import CheckpointError
from minicpm.train import checkpoint
from minicpm.train.checkpoint import Manifest
from minicpm.train.loop import StepRecord
from minicpm.train.settings import Ranks
from minicpm.train.state import TrainState


@dataclass
class Saver:
    """Writes the checkpoints of one run.

    A disk that is full costs a checkpoint, never the run: the older ones are whole, training goes on, and the warning
    comes again with every checkpoint that is missed.

    Attributes:
        run: the folder.
        facts: what every manifest says besides the step's own numbers: seed, tokenizer_sha256, run, parent.
        texts: small files that each checkpoint carries.
        tokens_through: step → tokens seen after it.
        say: writes a line for the person.
        on_saved: called after each success.
        ranks: only the first process writes.
        last_good: the newest checkpoint known to be whole.
        measured: the newest measurements on held-out text, which the manifest repeats.
    """

    run: Path
    facts: dict[str, Any]
    texts: dict[str, bytes]
    tokens_through: Callable[[int], int]
    say: Callable[[str], None]
    on_saved: Callable[[], None]
    ranks: Ranks
    last_good: Path | None = None
    measured: dict[str, float] = field(default_factory=dict)
    error: OSError | None = None

    def __call__(self, state: TrainState, record: StepRecord) -> None:
        """Write the checkpoint of `record.step`, or warn."""
        if not self.ranks.is_first:
            return
        manifest = Manifest(
            step=record.step,
            stage=record.stage,
            tokens=self.tokens_through(record.step),
            lr=record.lr,
            losses={"train": record.loss, "grad_norm": record.grad_norm, **record.means, **self.measured},
            **self.facts,
        )
        try:
            config = state.model.config if state.adapter is None else None
            texts = self.texts | state.adapter_texts()
            folder = checkpoint.save(self.run, manifest, config, state.weights(), state.tensors(), texts)
        except OSError as error:
            self.error = error
            good = self.last_good.name if self.last_good else "none yet"
            self.say(
                f"WARNING: step {record.step} was NOT saved: {error.strerror or error}. Training goes on; the last "
                f"good checkpoint is {good}. Make room on the disk of {self.run}."
            )
            return
        self.error, self.last_good = None, folder
        self.on_saved()

    def check_last(self, step: int) -> None:
        """Return if the checkpoint of `step`, the last of the run, is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self.error is not None:
            good = self.last_good.name if self.last_good else "none"
            raise CheckpointError(
                f"the run reached step {step}, but its checkpoint could not be written "
                f"({self.error.strerror or self.error}); the last good one is {good}: make room and go on with --resume"
            )
