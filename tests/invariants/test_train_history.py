"""A training writes its history beside itself: every due checkpoint, to the bit; the bits of the run do not move."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.tiny_run import LAST, go, hashes, load, quick_runs

from minicpm.errors import CheckpointError
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.history import History, HistoryWriter
from minicpm.history.verification import verify
from minicpm.model.loading import read_tensor
from minicpm.train import checkpoint
from minicpm.train.branch import branch_config
from minicpm.train.pretrain import make_state, prepare, pretrain
from minicpm.train.run_start import branch_from


@pytest.fixture(autouse=True, scope="module")
def _quick_runs() -> Iterator[None]:
    with quick_runs():
        yield


def check_against_folders(run: Path, history: History) -> None:
    """Where a step was also saved whole, the history gives the same bits, and says the same of it."""
    for folder in checkpoint.step_folders(run):
        manifest = checkpoint.read_manifest(folder)
        snapshot = history[manifest.step]
        for name, weight in open_checkpoint(folder).weights.items():
            assert snapshot.weight(name).data.tobytes() == weight.data.tobytes(), (folder, name)
        facts = snapshot.manifest.facts
        assert (facts.tokens, facts.stage, facts.lr, facts.seed) == (
            manifest.tokens, manifest.stage, manifest.lr, manifest.seed,
        )  # fmt: skip
        assert facts.losses["train"] == manifest.losses["train"]
        assert facts.data_cursor == {"next_row": manifest.tokens // 32}


def test_every_due_checkpoint_is_there_and_the_run_is_unmoved(
    home: Path, straight: dict[str, str], tmp_path: Path
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    go(load(home, "checkpoint.every=2", f"checkpoint.history={elsewhere}"), run)
    assert hashes(run / LAST) == straight
    assert not (run / "history").exists()
    history = History(elsewhere)
    assert history.steps == [0, 2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    assert [row.stage for row in history.rows][:2] == ["warmup", "warmup"]
    assert [row.step for row in history.rows if row.stage == "decay"] == [16, 18, 20]
    assert history.rows[-1].losses["heldout_loss"] > 0
    assert verify(history) == []
    check_against_folders(run, history)
    assert history.about.run["config"]["name"] == "tiny"
    assert "tokenizer.json" in history.about.files


def test_off_keeps_none(home: Path, straight: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(load(home, "checkpoint.history=off"), run)
    assert hashes(run / LAST) == straight
    assert not (run / "history").exists()


def test_an_interrupted_run_goes_on_with_its_history(home: Path, straight: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(load(home, "checkpoint.every=1"), run, crash_after=13)
    assert History(run).steps == list(range(14))
    with HistoryWriter(run / "history") as writer:
        # As if it had been killed while the last ones were still waiting.
        assert writer.drop_after(8) == [9, 10, 11, 12, 13]
    go(load(home, "checkpoint.every=1"), run, wants_resume=True)
    assert hashes(run / LAST) == straight
    history = History(run)
    # Step 9 was never saved whole; step 10 was, and came in when the run went on.
    assert history.steps == [*range(9), *range(10, 21)]
    assert verify(history) == []
    check_against_folders(run, history)


def test_steps_made_again_alike_are_kept(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(load(home, "checkpoint.every=1"), run, crash_after=13)
    before = {row.step: row.manifest_sha256 for row in History(run).rows}
    go(load(home, "checkpoint.every=1"), run, wants_resume=True)
    after = {row.step: row.manifest_sha256 for row in History(run).rows}
    assert {step: after[step] for step in before} == before
    assert list(after) == list(range(21))


def test_a_decay_from_a_step_that_only_the_history_has(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICPM_HOME", str(tmp_path / "cache"))
    run, branch = tmp_path / "run", tmp_path / "branch"
    go(load(home, "checkpoint.every=1", f"checkpoint.history={run / 'history'}"), run)
    found = branch_from(run, 12)
    assert not found.has_state
    config = branch_config(found, run, 4, "", [])
    ready = prepare(dataclasses.replace(config, name="branch"), branch, found, lambda line: None)
    state = make_state(ready)
    for name, weight in History(run)[12].weights().items():
        assert torch.equal(state.weights()[name], read_tensor(weight))
        assert torch.equal(state.optimizer.masters[name], read_tensor(weight).float())
    pretrain(ready, lambda line: None)
    history = History(branch)
    assert history.steps == [13, 14, 15, 16]
    assert {row.stage for row in history.rows} == {"decay"}
    parent = f"run@12 {History(run).row(12).manifest_sha256}"
    assert {snapshot.manifest.facts.parent for snapshot in history} == {parent}
    assert History(run).steps == list(range(21))
    with pytest.raises(CheckpointError, match="no checkpoint of step 21; the nearest are 17, 18, 19, 20"):
        branch_from(run, 21)
    # Where the step was saved whole, that is taken.
    assert branch_from(run, 10).has_state


def test_a_history_of_another_model_is_refused_at_once(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(load(home), run)
    for setting, reason in (
        ("model.scale_emb=10", "the history of another run: its config differs"),
        ("schedule.lr=0.02", "holds 5 checkpoints of a run with another configuration"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            go(load(home, f"checkpoint.history={run / 'history'}", setting), tmp_path / setting)
