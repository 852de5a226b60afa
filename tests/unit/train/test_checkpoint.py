"""Checkpoints: whole or absent, verified by hash, refused when broken, and a model folder that others open."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.model import load_model
from minicpm.train import checkpoint
from minicpm.train.checkpoint import Manifest
from minicpm.train.optim import OptimizerConfig
from minicpm.train.state import TrainState, new_state


@pytest.fixture
def state(tiny_config: ModelConfig) -> TrainState:
    return new_state(tiny_config, OptimizerConfig(), 3, "bfloat16", torch.device("cpu"))


def manifest(step: int) -> Manifest:
    return Manifest(step, "stable", step * 77, 0.01, {"train": 2.5}, 3, "0" * 64, {"name": "tiny"})


def save(run: Path, state: TrainState, step: int) -> Path:
    texts = {"note.txt": b"hello"}
    return checkpoint.save(run, manifest(step), state.model.config, state.weights(), state.tensors(), texts)


def test_what_is_written_is_whole_and_comes_back(tmp_path: Path, state: TrainState, tiny_config: ModelConfig) -> None:
    folder = save(tmp_path, state, 500)
    assert folder.name == "step_000500"
    assert {p.name for p in tmp_path.iterdir()} == {"step_000500"}
    found = checkpoint.verify(folder)
    assert (found.step, found.tokens, found.losses) == (500, 500 * 77, {"train": 2.5})
    other = new_state(tiny_config, OptimizerConfig(), 4, "bfloat16", torch.device("cpu"))
    other.load(*checkpoint.read_tensors(folder))
    for name, tensor in {**state.weights(), **state.tensors()}.items():
        assert torch.equal(tensor, {**other.weights(), **other.tensors()}[name]), name
    assert (folder / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_it_opens_as_a_model_folder(tmp_path: Path, state: TrainState) -> None:
    opened = open_checkpoint(save(tmp_path, state, 1))
    model = load_model(opened.config, opened.weights)
    ids = torch.arange(11)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), state.model(ids))


def test_masters_are_the_unrounded_start(state: TrainState, tiny_config: ModelConfig) -> None:
    exact = new_state(tiny_config, OptimizerConfig(), 3, "float32", torch.device("cpu"))
    for name, parameter in exact.model.named_parameters():
        assert torch.equal(state.optimizer.masters[name], parameter)


def test_broken_ones_are_named_and_skipped(tmp_path: Path, state: TrainState) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, state, step)
    with (tmp_path / "step_000005" / "state.safetensors").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    weights = tmp_path / "step_000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (tmp_path / "step_000003" / "manifest.json").unlink()
    (tmp_path / "step_000009").mkdir()
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000008")
    folder, found, skipped = checkpoint.newest_verified(tmp_path)
    assert folder is not None
    assert found is not None
    assert (folder.name, found.step) == ("step_000002", 2)
    assert len(skipped) == 5
    for text, message in zip(["no manifest", "step 1", "was changed", "bytes", "no manifest"], skipped, strict=True):
        assert text in message
    with pytest.raises(CheckpointError, match="nearest are 4, 5, 8, 9"):
        checkpoint.find(tmp_path, 7)


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        json.dumps({"format_version": 99}),
        None,
    ],
)
def test_manifests_of_other_kinds_are_refused(tmp_path: Path, state: TrainState, damage: str | None) -> None:
    folder = save(tmp_path, state, 1)
    text = (folder / "manifest.json").read_text()
    changed: Any = json.loads(text)
    changed["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(damage if damage is not None else json.dumps(changed))
    with pytest.raises(CheckpointError):
        checkpoint.verify(folder)


def test_a_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, state, 1)
    real = checkpoint.write_tensors

    def half(path: Path, tensors: Any) -> None:
        if path.name == checkpoint.STATE:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", half)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, state, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    checkpoint.verify(tmp_path / "step_000001")
    with pytest.raises(OSError, match="MB free"):
        checkpoint.check_space(tmp_path, 1 << 60)


def test_half_written_folders_are_cleared_and_steps_replaced(tmp_path: Path, state: TrainState) -> None:
    folder = save(tmp_path, state, 1)
    (folder / "manifest.json").unlink()
    (tmp_path / ".partial-step_000002-ab").mkdir()
    checkpoint.clear_partial(tmp_path)
    save(tmp_path, state, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    checkpoint.verify(folder)
