"""Preference tuning as batches and a loss: log-probabilities of answers, against those of the model at the start.

The reference is the model before its first update. Its log-probabilities of all answers are computed once and kept in
the run's folder, so that tuning has one model in memory. What this leaves out: the losses' formulas (`preference`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicpm.data.answers import AnswerBatch, AnswerSet
from minicpm.data.atomic import new_folder
from minicpm.errors import CheckpointError
from minicpm.model.minicpm import MiniCPM
from minicpm.train import fused, preference
from minicpm.train.corpus import StepBatches
from minicpm.train.losses import linear_token_losses
from minicpm.train.preference_report import PreferenceSums, describe_measured
from minicpm.train.running import Measurement, Ready
from minicpm.train.settings import Ranks
from minicpm.train.state import TrainState
from minicpm.train.tune_config import PreferenceConfig
from minicpm.train.work import LossParts, Work

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Answers:
    """Answers with their reference's log-probabilities (R); `drift` are those of the whole step, of judged answers."""

    batch: AnswerBatch
    reference: Floats
    step: int = 0
    drift: tuple[tuple[AnswerBatch, Floats], ...] = ()


def log_probabilities(model: MiniCPM, batch: AnswerBatch, device: torch.device) -> Tensor:
    """Return the summed log-probability of every answer, float32 (R)."""
    ids, targets = (torch.from_numpy(array).to(device) for array in (batch.input_ids, batch.targets))
    hidden = fused.hidden_states(model, ids)
    return -linear_token_losses(hidden, model.head_weight, targets, model.config.logit_divisor).sum(dim=1)


def preference_loss(config: PreferenceConfig, device: torch.device) -> Callable[[MiniCPM, Answers, float], LossParts]:
    """Return the loss of answers, with rewards, margins and lengths as named sums.

    KTO's drift is measured once a step, over all answers of the step: micro-batches do not change it.
    """
    measured: dict[int, Tensor] = {}

    def drift_of(model: MiniCPM, answers: Answers) -> Tensor:
        if answers.step not in measured or not answers.step:
            measured.clear()
            with torch.no_grad():
                gaps = [log_probabilities(model, batch, device) - _tensor(reference, device)
                        for batch, reference in answers.drift]  # fmt: skip
            measured[answers.step] = torch.cat(gaps).mean().clamp(min=0)
        return measured[answers.step]

    def loss(model: MiniCPM, answers: Answers, factor: float) -> LossParts:
        # Before the graph: its activations would lie beside those of the answers.
        drift = drift_of(model, answers) if config.loss == "kto" else None
        ratios = log_probabilities(model, answers.batch, device) - _tensor(answers.reference, device)
        sums = PreferenceSums(config.beta)
        if drift is not None:
            good = torch.from_numpy(answers.batch.is_good).to(device)
            losses = preference.kto_losses(ratios, good, drift, config.beta, config.good_weight, config.bad_weight)
            return LossParts(losses.sum() * factor, sums.judged(losses, ratios, good, drift))
        chosen, rejected = ratios.chunk(2)
        chosen_tokens, rejected_tokens = torch.from_numpy(answers.batch.num_targets).to(device).chunk(2)
        if config.loss == "ipo":
            losses = preference.ipo_losses(chosen, rejected, chosen_tokens, rejected_tokens, config.beta)
        else:
            losses = preference.dpo_losses(chosen, rejected, config.beta, config.label_smoothing)
        return LossParts(losses.sum() * factor, sums.pairs(losses, chosen, rejected, chosen_tokens, rejected_tokens))

    return loss


class AnswerWork:
    """Batches, loss and measurement of a run on answers; made once the model stands, for its reference."""

    def __init__(self, ready: Ready[Any, Any], state: TrainState, say: Callable[[str], None]) -> None:
        config, corpus = ready.config, ready.corpus
        self.config, self.device = config, ready.device
        self.answers: AnswerSet = corpus.answers
        self.is_judged = config.preference.loss == "kto"
        sets = {"answers": corpus.answers, "heldout": corpus.heldout_answers}
        if self.is_judged:
            sets |= {f"{name} mismatched": found.mismatched() for name, found in list(sets.items()) if found}
        self.sets = {name: found for name, found in sets.items() if found is not None}
        self.reference = self._reference(ready, state, say)
        self.batches = StepBatches(self._make, config.batch, config.schedule.total_steps, Ranks())
        self.loss = preference_loss(config.preference, ready.device)
        self.work = Work(
            self._of_step,
            lambda answers: float(len(answers.batch.indices) // self.answers.rows_per_item),
            self.loss,
            lambda answers: answers.batch.input_ids.size,
            lambda answers: {"rows": list(answers.batch.where)},
            "kto" if self.is_judged else "dpo",
        )
        has_heldout = "heldout" in self.sets
        self.measurement = Measurement(self._measure, describe_measured) if has_heldout else None

    def _make(self, first: int, count: int) -> Answers:
        return self._answers("answers", self.answers.items(first, count))

    def _answers(self, name: str, items: NDArray[np.int64]) -> Answers:
        batch = self.sets[name].take(items)
        return Answers(batch, self.reference[name][batch.indices])

    def _of_step(self, step: int) -> list[Answers]:
        return self._with_drift("answers", self.batches(step), step)

    def _with_drift(self, name: str, parts: Sequence[Answers], step: int) -> list[Answers]:
        if not self.is_judged:
            return list(parts)
        other = f"{name} mismatched"
        drift = tuple(
            (self.sets[other].take_rows(part.batch.indices), self.reference[other][part.batch.indices])
            for part in parts
        )
        return [dataclasses.replace(part, step=step, drift=drift) for part in parts]

    @torch.no_grad()
    def _measure(self, state: TrainState) -> dict[str, float]:
        state.model.eval()
        sums = PreferenceSums(self.config.preference.beta)
        found, micro = self.sets["heldout"], self.config.batch.micro_sequences
        for first in range(0, found.num_items, micro):
            items = np.arange(first, min(first + micro, found.num_items))
            (answers,) = self._with_drift("heldout", [self._answers("heldout", items)], 0)
            sums.add(self.loss(state.model, answers, 1.0).sums)
        state.model.train()
        return sums.heldout()

    def _reference(self, ready: Ready[Any, Any], state: TrainState, say: Callable[[str], None]) -> dict[str, Floats]:
        """Return the log-probabilities of all rows under the model before its first update, by set."""
        folder = ready.run / "data" / "reference"
        facts = {name: found.content_hash for name, found in self.sets.items()}
        digest = hashlib.sha256(json.dumps([facts, ready.config.base, ready.config.loop.dtype]).encode()).hexdigest()
        kept = _read_reference(folder, digest, self.sets)
        if kept is not None:
            return kept
        if state.step:
            # The model has moved; its start is the base, which adapters stand beside and full tuning has overwritten.
            raise CheckpointError(f"{folder} is missing or of other rows, and the run is under way; begin another run")
        say("computing the reference's log-probabilities, once …")
        found = {name: self._of_model(state, answers) for name, answers in self.sets.items()}
        with new_folder(folder, replaces=True) as temporary:
            for name, values in found.items():
                np.save(temporary / f"{name}.npy", values, allow_pickle=False)
            (temporary / "identity.txt").write_text(digest)
        return found

    @torch.no_grad()
    def _of_model(self, state: TrainState, answers: AnswerSet) -> Floats:
        state.model.eval()
        values = np.empty(len(answers.rows), np.float32)
        # Rows of like length together: little of a batch is padding.
        order = np.argsort([len(row.ids) for row in answers.rows], kind="stable")
        for start in range(0, len(order), 2 * self.config.batch.micro_sequences):
            indices = order[start : start + 2 * self.config.batch.micro_sequences]
            batch = answers.take_rows(indices)
            values[indices] = log_probabilities(state.model, batch, self.device).cpu().numpy()
        state.model.train()
        return values


def _read_reference(folder: Any, digest: str, sets: dict[str, AnswerSet]) -> dict[str, Floats] | None:
    try:
        if (folder / "identity.txt").read_text() != digest:
            return None
        found = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in sets}
    except (OSError, ValueError):
        return None
    return found if all(len(found[name]) == len(answers.rows) for name, answers in sets.items()) else None


def _tensor(values: Floats, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
