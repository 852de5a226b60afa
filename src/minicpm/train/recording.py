"""A run's checkpoints into its history, beside the training: the loop hands a copy of the weights over and goes on.

What this leaves out: what resumes a run to the bit (`checkpoint`: masters, moments, random state), and the coding
(`history`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minicpm.errors import CheckpointError
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.weight import Weight
from minicpm.history.background import BackgroundWriter
from minicpm.history.catalogue import About
from minicpm.history.manifest import Facts
from minicpm.history.store import HistoryWriter
from minicpm.train import checkpoint
from minicpm.train.loop import StepRecord
from minicpm.train.saving import Saver
from minicpm.train.settings import RunConfig
from minicpm.train.state import TrainState

_BLOCK_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Recorder:
    """A hook of the loop that adds the checkpoints which are due to the history; `close` waits for the last.

    Args:
        history: the folder.
        config: of the run.
        saver: whose facts and measurements every checkpoint gets.
        state: at the run's start; a new run's weights become step 0.
        say: writes a line for the person.
        stage: the name of step 0's stage; empty is the schedule's first.

    Raises:
        CheckpointError: the folder is another run's history, another process writes it, or the disk does not take it.
    """

    def __init__(
        self,
        history: Path,
        config: RunConfig,
        saver: Saver,
        state: TrainState,
        say: Callable[[str], None],
        stage: str = "",
    ) -> None:
        self._config = config
        self._saver = saver
        about = About(
            state.model.config,
            saver.facts["tokenizer_sha256"],
            saver.facts["run"],
            base_error=config.checkpoint.base_error,
            max_reads=config.checkpoint.max_reads,
        )
        writer = HistoryWriter(history, about, saver.texts)
        self._known = set(writer.rows)
        if state.step == 0 and len(self._known) > 1 and writer.about.run.get("config") != about.run["config"]:
            writer.close()
            raise CheckpointError(
                f"{history} holds {len(self._known)} checkpoints of a run with another configuration; name another "
                "folder with checkpoint.history, or remove it first"
            )
        self._writer = BackgroundWriter(writer, say)
        if state.step == 0:
            start = Facts(0, stage=stage or "warmup", seed=config.loop.seed, parent=saver.facts["parent"])
            self._writer.add(start, copy_weights(state))
        else:
            self._catch_up(state.step)

    def __call__(self, state: TrainState, record: StepRecord) -> None:
        """Hand the checkpoint of `record.step` over, if it is due."""
        if self._is_due(record.step):
            losses = {"train": record.loss, "grad_norm": record.grad_norm, **record.means, **self._saver.measured}
            facts = self._facts(record.step, record.stage, record.lr, losses)
            self._writer.add(facts, copy_weights(state))

    def close(self) -> None:
        """Wait until everything handed over is in the history."""
        self._writer.close()

    @property
    def waited_seconds(self) -> float:
        """How long the loop stood still because the checkpoint before was not written yet."""
        return self._writer.waited_seconds

    def _is_due(self, step: int) -> bool:
        every = self._config.checkpoint.every
        return self._config.loop.is_saved(step, self._config.schedule.total_steps) or bool(every and step % every == 0)

    def _facts(self, step: int, stage: str, lr: float, losses: Mapping[str, float]) -> Facts:
        batch = self._config.batch
        return Facts(
            step=step,
            tokens=batch.tokens_through(step),
            stage=stage,
            lr=lr,
            batch_sequences=batch.at(step),
            losses={name: float(value) for name, value in losses.items() if math.isfinite(value)},
            data_cursor={"next_row": batch.sequences_before(step + 1)},
            seed=self._config.loop.seed,
            parent=self._saver.facts["parent"],
        )

    def _catch_up(self, last_step: int) -> None:
        """Add what an interrupted run saved whole but had not yet in its history."""
        for folder in checkpoint.step_folders(self._saver.run):
            if int(folder.name[5:]) > last_step or int(folder.name[5:]) in self._known:
                continue
            try:
                manifest = checkpoint.verify(folder)
            except CheckpointError:
                continue  # the resume has named it already, or it is older than what it began from
            facts = self._facts(manifest.step, manifest.stage, manifest.lr, manifest.losses)
            self._writer.add(facts, open_checkpoint(folder).weights)


def copy_weights(state: TrainState) -> dict[str, Weight]:
    """Return the model's weights as they are now, in memory of their own."""
    return {name: _copy(tensor) for name, tensor in state.weights().items()}


def _copy(tensor: Tensor) -> Weight:
    copy = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1, tensor.shape[-1])
    return Weight(_BLOCK_TYPES[tensor.dtype], tuple(tensor.shape), copy.view(torch.uint8).numpy())
