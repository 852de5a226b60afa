"""The engine's benchmark: every row has its bar, the shares are sane, and the random model is one."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from bench import engine
from bench.random_model import random_q4_0, write_random_model
from bench.rows import compare

from minicpm.architecture import ModelConfig
from minicpm.engine.speed import Stopwatch
from minicpm.errors import EngineError
from minicpm.formats.checkpoint import open_checkpoint


@pytest.fixture
def subject(tiny_config: ModelConfig, tmp_path: Path) -> engine.Subject:
    path = tmp_path / "random.gguf"
    write_random_model(path, tiny_config.replace(max_position_embeddings=2048))
    return engine.Subject("tiny", path, argparse.Namespace(threads=1, quick=True, rounds=1), "", None)


def test_random_blocks_have_the_width_asked_for_and_no_strange_numbers() -> None:
    weight = random_q4_0(np.random.default_rng(1), (64, 2048), 0.05)
    values = weight.decode()
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(0.05, rel=0.1)
    # 16 nibbles with scales that differ from block to block.
    assert len(np.unique(values)) > 1000


def test_a_random_model_runs_at_the_pace_of_a_real_one(subject: engine.Subject, tiny_config: ModelConfig) -> None:
    checkpoint = open_checkpoint(subject.path)
    assert checkpoint.config.hidden_size == tiny_config.hidden_size
    assert {e.block_type for e in checkpoint.weights.entries.values() if len(e.shape) > 1} == {"Q4_0"}
    table, ids = np.arange(2, dtype=np.int32)[None], np.arange(40, dtype=np.int32)
    logits = subject.decoder.step(ids, ids, ids * 0, table, ids)
    assert np.isfinite(logits).all()
    assert 1e-3 < logits.std() < 1e3


def test_rows_of_a_subject(subject: engine.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.rows.wait_for_calm", lambda: True)
    monkeypatch.setattr(engine, "READ_BYTES", 1 << 26)
    rows = engine.decode(subject, "decode-2b") + engine.decode(subject, "decode-2b-1024", engine.CONTEXT)
    rows += engine.decode(subject, "batch16-2b", 0, engine.BATCH)
    assert [(row.name, row.unit, row.must) for row in rows] == [
        ("decode-2b", "GB/s", 0.72),
        ("decode-2b-1024", "GB/s", 0.68),
        ("batch16-2b", "GB/s", None),
    ]
    assert all(0 < row.ratio == row.ours / row.peer for row in rows)


def test_rows_without_amx_are_others_under_their_own_bars() -> None:
    measured = [
        compare("decode-2b", 20.0, 25.0, "read bandwidth", "GB/s", 0.72),
        compare("decode-2b-vs-llamacpp", 20.0, 16.0, "llama.cpp", "tokens/s", 1.2),
        compare("decode-2b-1024", 18.0, 25.0, "read bandwidth", "GB/s", 0.68),
    ]
    found = [(row.name, row.ratio, row.must) for row in engine.renamed(measured, "noamx-2b-decode")]
    assert found == [("noamx-2b-decode", 0.8, None), ("noamx-2b-decode-vs-llamacpp", 1.25, 2.0)]


def test_every_row_has_a_job_and_a_bar() -> None:
    assert engine.JOBS.keys() == engine.MUSTS.keys()
    subjects = [subject for subject, _ in engine.JOBS.values()]
    assert subjects == sorted(subjects, key=subjects.index), "rows of one subject stand together"


def test_what_does_not_fit_the_cache_is_refused(subject: engine.Subject) -> None:
    watch = Stopwatch(subject.decoder)
    with pytest.raises(EngineError, match="the decoder has"):
        watch.prefill(4096)
    with pytest.raises(EngineError, match="2 sequences of 1032 tokens"):
        watch.decode(8, context=1024, batch=2)
