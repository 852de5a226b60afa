"""A tiny kind of training on random tokens: real model, real loss, batches as a function of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from minicpm.architecture import ModelConfig
from minicpm.model import MiniCPM
from minicpm.train import fused
from minicpm.train.losses import IGNORED, linear_cross_entropy
from minicpm.train.work import LossParts, Work


@dataclass
class Rows:
    step: int
    inputs: Tensor
    targets: Tensor
    documents: Tensor


def rows_of(config: ModelConfig, step: int, num_rows: int = 8, length: int = 11) -> Rows:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, config.vocab_size, (num_rows, length + 1), generator=generator)
    targets = ids[:, 1:].clone()
    # Unequal numbers of targets in every row, so that a mean of means would show.
    for row in range(num_rows):
        targets[row, : row % 4] = IGNORED
    documents = (torch.arange(length) >= 5).long().expand(num_rows, length)
    return Rows(step, ids[:, :-1], targets, documents)


def make_work(config: ModelConfig, micro: int = 8, poison: int = 0) -> Work[Rows]:
    def batches(step: int) -> list[Rows]:
        rows = rows_of(config, step)
        parts = zip(rows.inputs.split(micro), rows.targets.split(micro), rows.documents.split(micro), strict=True)
        return [Rows(step, *part) for part in parts]

    def loss(model: MiniCPM, rows: Rows, factor: float) -> LossParts:
        hidden = fused.hidden_states(model, rows.inputs, document_ids=rows.documents)
        total, losses = linear_cross_entropy(
            hidden, model.head_weight, rows.targets, divisor=model.config.logit_divisor, factor=factor
        )
        if rows.step == poison:
            total = total * float("nan")
        return LossParts(total, {"loss/a": (float(losses.sum()), float((rows.targets != IGNORED).sum()))})

    return Work(
        batches=batches,
        weight=lambda rows: float((rows.targets != IGNORED).sum()),
        loss=loss,
        tokens=lambda rows: rows.inputs.numel(),
        identify=lambda rows: {"step": rows.step, "rows": len(rows.inputs)},
    )


@pytest.fixture
def two_layers(tiny_config: ModelConfig) -> ModelConfig:
    return tiny_config.replace(num_hidden_layers=2)


@pytest.fixture
def make_tiny_work() -> Callable[..., Work[Rows]]:
    return make_work


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second thread, and lose much where other processes hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
