"""What holds of batches whoever makes them: same bits for all workers and ranks, nothing across documents' borders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minicpm.data import Batch, BatchStream, Mix, Span, StageMixture, TokenShards
from minicpm.data.shard_writer import ShardWriter
from minicpm.errors import ConfigError


def write(folder: Path, lengths: list[int], start: int, supervised_from: int | None = None) -> TokenShards:
    """Documents 1 (bos), then ids that occur nowhere else, then 2 (eos)."""
    folder.mkdir()
    writer = ShardWriter(folder, 1 << 20, is_supervised=supervised_from is not None, shard_tokens=400)
    ids = []
    for length in lengths:
        ids += [1, *range(start, start + length - 2), 2]
        start += length
    mask = None
    if supervised_from is not None:
        mask = np.concatenate([np.arange(n) >= supervised_from for n in lengths]).astype(np.uint8)
    sizes = np.array(lengths, np.int64)
    writer.add(np.array(ids, np.uint32), sizes, sizes, mask)
    writer.finish({"tokenizer_hash": "abc", "pad_id": 2})
    return TokenShards.open(folder)


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, TokenShards]:
    rng = np.random.default_rng(5)
    return {
        "web": write(tmp_path / "web", rng.integers(3, 90, 60).tolist(), 10),
        "code": write(tmp_path / "code", rng.integers(3, 200, 20).tolist(), 100_000),
        "sft": write(tmp_path / "sft", rng.integers(12, 60, 30).tolist(), 200_000, supervised_from=7),
    }


def stream(shards: dict[str, TokenShards], seed: int = 3, decay_at: int = 40) -> BatchStream:
    stable = StageMixture((Mix("web", 0.7), Mix("code", 0.3)))
    decay = StageMixture((Mix("web", 0.4), Mix("code", 0.1), Mix("sft", 0.5)), "decay")
    return BatchStream([Span(0, stable), Span(decay_at, decay)], shards, 32, seed=seed)


def bits(batch: Batch) -> list[bytes]:
    arrays = (batch.input_ids, batch.targets, batch.document_ids, batch.positions, batch.source_ids)
    return [array.tobytes() for array in arrays]


RANGES = [(row, 8) for row in range(0, 96, 8)]


def test_any_number_of_workers_gives_the_same_bits(shards: dict[str, TokenShards]) -> None:
    made = [[bits(b) for b in stream(shards).prefetch(RANGES, workers)] for workers in (0, 1, 4)]
    assert made[0] == made[1] == made[2]
    assert made[0] == [bits(stream(shards).batch(*r)) for r in RANGES]
    assert made[0] != [bits(stream(shards, seed=4).batch(*r)) for r in RANGES]


def test_prefetch_can_be_left_early(shards: dict[str, TokenShards]) -> None:
    iterator = stream(shards).prefetch(((i, 1) for i in range(10**9)), 4)
    assert next(iterator).first_row == 0
    iterator.close()


def test_a_batch_is_its_parts_one_after_another(shards: dict[str, TokenShards]) -> None:
    whole = stream(shards).batch(16, 24)
    for parts in ([(16, 1), (17, 23)], [(16, 8), (24, 8), (32, 8)], [(16 + i, 1) for i in range(24)]):
        batches = [stream(shards).batch(*part) for part in parts]
        for name in ("input_ids", "targets", "document_ids", "positions", "source_ids"):
            joined = np.concatenate([getattr(b, name) for b in batches])
            assert np.array_equal(joined, getattr(whole, name))
        assert sum(b.num_targets for b in batches) == whole.num_targets


def test_a_branch_sees_what_a_run_that_decayed_there_sees(shards: dict[str, TokenShards]) -> None:
    longer, straight = stream(shards, decay_at=80), stream(shards, decay_at=40)
    assert bits(longer.batch(0, 40)) == bits(straight.batch(0, 40))
    branch = stream(shards, decay_at=40)
    assert bits(branch.batch(40, 8)) == bits(straight.batch(40, 8))
    assert bits(branch.batch(40, 8)) != bits(longer.batch(40, 8))


def test_targets_follow_inputs_and_never_cross_documents(shards: dict[str, TokenShards]) -> None:
    data = stream(shards)
    for first in (0, 40, 200):
        batch = data.batch(first, 40)
        inside = batch.document_ids >= 0
        assert (batch.targets[~inside] == -100).all()
        assert (batch.positions[~inside] == 0).all()
        covered = np.zeros_like(inside)
        for ref in batch.references:
            opened = shards[ref.source]
            document = opened.document(ref.document)
            at = (ref.row, slice(ref.column, ref.column + ref.length))
            assert np.array_equal(batch.input_ids[at], document[ref.offset : ref.offset + ref.length])
            following = document[ref.offset + 1 : ref.offset + 1 + ref.length].astype(np.int64)
            if opened.is_supervised:
                mask = np.arange(ref.offset + 1, ref.offset + 1 + ref.length) >= 7
                following = np.where(mask, following, -100)
            assert np.array_equal(batch.targets[at], following)
            assert np.array_equal(batch.positions[at], np.arange(ref.length))
            assert len(set(batch.document_ids[at].tolist())) == 1
            assert not covered[at].any()
            covered[at] = True
            # bos begins documents only, eos is only ever a target at their end.
            assert (batch.input_ids[at] == 1).tolist() == [ref.offset == 0] + [False] * (ref.length - 1)
            assert not (batch.input_ids[at] == 2).any()
        assert np.array_equal(covered, inside)
        for index, row in enumerate(batch.document_ids):
            ids = row[row >= 0]
            assert (np.diff(ids) >= 0).all()
            # As many ids as segments: no two documents, however short, look like one to attention.
            assert sorted(set(ids.tolist())) == list(range(sum(ref.row == index for ref in batch.references)))


def test_one_epoch_teaches_every_token_once(shards: dict[str, TokenShards]) -> None:
    only = BatchStream([Span(0, StageMixture((Mix("web", 1.0),)))], shards, 32, seed=1)
    batch = only.batch(0, only.order.plans[0].num_rows)
    learned = batch.targets[batch.targets != -100]
    ids = np.concatenate([shards["web"].document(i) for i in range(shards["web"].num_documents)])
    assert sorted(learned.tolist()) == sorted(ids[ids != 1].tolist())


def test_counts_by_source(shards: dict[str, TokenShards]) -> None:
    batch = stream(shards).batch(40, 200)
    inputs, targets = batch.tokens_by_source(), batch.targets_by_source()
    assert sum(inputs.values()) == batch.num_inputs == int((batch.document_ids >= 0).sum())
    assert sum(targets.values()) == batch.num_targets
    assert inputs["web"] == targets["web"]
    assert 0 < targets["sft"] < inputs["sft"]
    assert inputs["sft"] / batch.num_inputs == pytest.approx(0.5, abs=0.03)


def test_reopened_data_gives_the_same_bits(shards: dict[str, TokenShards], tmp_path: Path) -> None:
    again = {name: TokenShards.open(opened.path) for name, opened in shards.items()}
    assert bits(stream(again).batch(33, 9)) == bits(stream(shards).batch(33, 9))


def test_what_cannot_be_is_refused(shards: dict[str, TokenShards]) -> None:
    with pytest.raises(ConfigError, match="sequence_length must be at least 2"):
        BatchStream([Span(0, StageMixture((Mix("web", 1.0),)))], shards, 1, seed=1)
    with pytest.raises(ConfigError, match="a batch needs"):
        stream(shards).batch(-1, 4)
    with pytest.raises(ConfigError, match="mixture name 'wab' is unknown"):
        BatchStream([Span(0, StageMixture((Mix("wab", 1.0),)))], shards, 8, seed=1)
