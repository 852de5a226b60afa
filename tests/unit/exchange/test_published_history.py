"""Files pytorch_model.NNNNN as MiniCPM-2B-history publishes them become a labelled history; all else is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.history.conftest import weights_at

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, FormatError, MiniCPMError
from minicpm.exchange.published_history import import_published, released_facts
from minicpm.formats.hf_config import config_to_hf
from minicpm.history import History
from minicpm.history.verification import verify
from minicpm.model.loading import read_tensor

STEPS = {250_000: 0, 260_000: 50, 270_000: 100, 280_000: 150}


@pytest.fixture
def published(tmp_path: Path, tiny_config: ModelConfig) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(tiny_config)))
    for step, like in STEPS.items():
        state = {name: read_tensor(weight) for name, weight in weights_at(tiny_config, like).items()}
        # As saved by transformers 4.36: the tied head beside the embedding.
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        torch.save(state, folder / f"pytorch_model.{step}")
    return folder


def test_every_file_is_brought_in_and_labelled(published: Path, tmp_path: Path, tiny_config: ModelConfig) -> None:
    rows = import_published(published, tmp_path / "history")
    assert [(row.step, row.stage, row.tokens) for row in rows] == [
        (250_000, "stable", 250_000 * 3_932_160),
        (260_000, "stable", 260_000 * 3_932_160),
        (270_000, "decay", 270_000 * 3_932_160),
        (280_000, "tail", 280_000 * 3_932_160),
    ]
    history = History(tmp_path / "history")
    assert verify(history) == []
    assert history[270_000].manifest.facts.labels == {"imported_from": "pytorch_model.270000"}
    for step, like in STEPS.items():
        for name, weight in weights_at(tiny_config, like).items():
            assert history[step].weight(name).data.tobytes() == weight.data.tobytes()
    # Once more with one file more: only that is read.
    (published / "pytorch_model.250000").write_bytes(b"broken since")
    before = (tmp_path / "history" / "index.json").read_bytes()
    with pytest.raises(FormatError, match=r"does not hold plain tensors"):
        import_published(published, tmp_path / "history")
    assert (tmp_path / "history" / "index.json").read_bytes() == before


def test_the_released_schedule() -> None:
    at = {step: released_facts(step, "x") for step in (0, 261_000, 261_001, 266_000, 279_500, 279_501, 300_000)}
    assert [facts.stage for facts in at.values()] == ["stable", "stable", "decay", "decay", "decay", "tail", "tail"]
    assert at[0].lr == at[261_000].lr == 0.01
    assert at[266_000].lr == pytest.approx(0.005)
    assert at[279_500].lr == pytest.approx(0.00076947, rel=1e-4)


class _Harm:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def test_pickles_that_do_something_are_refused(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model.norm.weight": _Harm()}, published / "pytorch_model.265000")
    with pytest.raises(FormatError, match="does not hold plain tensors"):
        import_published(published, tmp_path / "history")
    assert not (tmp_path / "harmed").exists()
    # What came before it is there and whole.
    history = History(tmp_path / "history")
    assert history.steps == [250_000, 260_000]
    assert verify(history) == []


def test_folders_that_are_no_publication(published: Path, tmp_path: Path) -> None:
    (published / "pytorch_model.250000.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="are both of step 250000"):
        import_published(published, tmp_path / "history")
    (published / "config.json").unlink()
    (published / "pytorch_model.250000.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        import_published(published, tmp_path / "history")
    with pytest.raises(MiniCPMError, match=r"holds no file pytorch_model\.NNNNN"):
        import_published(tmp_path, tmp_path / "history")
    with pytest.raises(CheckpointError, match="is no folder"):
        import_published(tmp_path / "none", tmp_path / "history")
    assert not (tmp_path / "history").exists()
