"""What must not change a training run: who prepares its batches, how they are dealt out, and where its decay begins."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny_run import LAST, go, hashes, load, quick_runs, start
from torch import Tensor

from minicpm.data.batches import Batch
from minicpm.errors import ConfigError
from minicpm.train import checkpoint
from minicpm.train.branch import branch_config
from minicpm.train.corpus import StepBatches
from minicpm.train.log import read_metrics
from minicpm.train.pretrain import PretrainReady, make_state, prepare, pretrain, pretraining_loss
from minicpm.train.run_start import branch_from
from minicpm.train.settings import Ranks

TENSORS = ("model.safetensors", "state.safetensors")


@pytest.fixture(autouse=True, scope="module")
def _quick_runs() -> Iterator[None]:
    with quick_runs():
        yield


@pytest.mark.parametrize("workers", [0, 4])
def test_threads_that_prepare_batches_change_nothing(
    home: Path, straight: dict[str, str], workers: int, tmp_path: Path
) -> None:
    """`straight` has one."""
    go(load(home, f"corpus.workers={workers}"), tmp_path / "run")
    found = hashes(tmp_path / "run" / LAST)
    assert [found[name] for name in TENSORS] == [straight[name] for name in TENSORS]


def test_a_branch_is_the_run_that_decayed_there(home: Path, straight: dict[str, str], tmp_path: Path) -> None:
    # "straight" decays after 15; a run that was meant to go on for long reaches 15 with the same bits.
    go(load(home, "schedule.total_steps=200"), home / "long", crash_after=15)
    from_step = branch_from(home / "long", 15)
    config = branch_config(from_step, home / "long", 5, "", [])
    run = tmp_path / "branch"
    pretrain(prepare(config, run, from_step, print), print)
    found = hashes(run / LAST)
    assert [found[name] for name in TENSORS] == [straight[name] for name in TENSORS]
    manifest = checkpoint.read_manifest(run / LAST)
    assert (manifest.parent or "").startswith("long@15 ")
    assert manifest.stage == "decay"


def test_what_is_mixed_into_a_decay_has_its_share(home: Path, straight: dict[str, str], tmp_path: Path) -> None:
    extra = tmp_path / "extra.jsonl"
    sentences = (f"A different sort of text, about {i} things in particular." for i in range(400))
    extra.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences))
    from_step = branch_from(home / "straight", 15)
    config = branch_config(from_step, home / "straight", 12, "wsd-linear", [(str(extra), 0.25, "text")])
    ready = prepare(dataclasses.replace(config, name="mixed"), tmp_path / "run", from_step, print)
    spans = ready.config.spans()
    assert [span.mixture.shares for span in spans] == [{"data": 1.0}, {"data": 0.75, "extra": 0.25}]
    assert spans[1].first_row == ready.config.batch.sequences_before(16)
    pretrain(ready, print)
    means = [row["loss/extra"] for row in read_metrics(tmp_path / "run") if "loss/extra" in row]
    assert means[-1] < means[0]
    with pytest.raises(ConfigError, match="decay stage; branch from a stable"):
        branch_config(branch_from(home / "straight", 20), home / "straight", 5, "", [])


def test_micro_batches_change_no_loss(home: Path, tmp_path: Path) -> None:
    """8 rows at once, 2 at a time, 1 at a time, in float32."""
    curves = []
    for micro in (8, 2, 1):
        run = tmp_path / str(micro)
        overrides = ("loop.dtype=float32", "loop.save_every=100", "loop.eval_every=0", "batch.sequences=[8]")
        go(load(home, *overrides, f"batch.micro_sequences={micro}"), run)
        curves.append(np.array([row["loss"] for row in read_metrics(run)]))
    assert curves[0].shape == (20,)
    assert curves[0][-1] < curves[0][0] - 0.5
    for curve in curves[1:]:
        # Measured 2e-8 and 1.4e-7.
        assert abs(curve[0] / curves[0][0] - 1) <= 1e-6
        assert abs(curve / curves[0] - 1).max() <= 1e-5


def test_micro_batches_and_ranks_deal_out_the_same_rows(home: Path) -> None:
    ready = start(load(home), home / "dealt")
    for step in (1, 4, 5, 19):
        whole = step_batches(ready, 8, Ranks()).make(step)
        expected = [row.tolist() for batch in whole for row in batch.input_ids]
        assert len(expected) == (2 if step <= 4 else 4)
        for world in (1, 2):
            for micro in (1, 2, 3):
                dealt: list[list[int]] = []
                for rank in range(world):
                    parts = step_batches(ready, micro, Ranks(rank, world)).make(step)
                    dealt += [row.tolist() for batch in parts for row in batch.input_ids]
                assert dealt == expected


def test_packed_documents_train_like_separate_ones(home: Path) -> None:
    """The loss and all gradients of packed rows are the sums of those of their documents, each in a row of its own."""
    ready = start(load(home, "loop.dtype=float32", "batch.sequence_length=200"), home / "dealt")
    packed = ready.corpus.stream.batch(0, 6)
    alone = [row_of(packed, reference) for reference in packed.references]
    assert len(alone) > len(packed.input_ids) + 3
    factor = 1.0 / packed.num_targets
    whole, whole_grads = slopes(ready, [packed], factor)
    parts, part_grads = slopes(ready, alone, factor)
    # Measured 3e-8 and 3.5e-7.
    assert parts == pytest.approx(whole, rel=1e-6)
    assert whole_grads.keys() == part_grads.keys()
    for name, grad in whole_grads.items():
        assert (part_grads[name] - grad).norm() <= 5e-6 * grad.norm(), name
    # Without borders the gradients are others.
    merged = dataclasses.replace(
        packed,
        document_ids=np.zeros_like(packed.document_ids),
        positions=np.broadcast_to(np.arange(200, dtype=np.int32), (6, 200)).copy(),
    )
    wrong_grads = slopes(ready, [merged], factor)[1]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (wrong_grads[name] - whole_grads[name]).norm() > 0.05 * whole_grads[name].norm()


def step_batches(ready: PretrainReady, micro: int, ranks: Ranks) -> StepBatches[Batch]:
    batch = dataclasses.replace(ready.config.batch, micro_sequences=micro)
    return StepBatches(ready.corpus.stream.batch, batch, ready.config.schedule.total_steps, ranks)


def row_of(batch: Batch, reference: object) -> Batch:
    row, column, length = (getattr(reference, name) for name in ("row", "column", "length"))
    at = (slice(row, row + 1), slice(column, column + length))
    arrays = {name: getattr(batch, name)[at] for name in ("input_ids", "targets", "document_ids", "positions")}
    return dataclasses.replace(batch, source_ids=batch.source_ids[row : row + 1], references=(), **arrays)


def slopes(ready: object, batches: list[Batch], factor: float) -> tuple[float, dict[str, Tensor]]:
    state = make_state(ready)
    loss = pretraining_loss(torch.device("cpu"), False)
    total = 0.0
    for batch in batches:
        part = loss(state.model, batch, factor).total
        part.backward()
        total += float(part.detach())
    return total, {name: grad.clone() for name, grad in state.optimizer.collected().items()}
