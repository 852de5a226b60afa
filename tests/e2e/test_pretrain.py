"""From raw text to a model that answers, through the real command."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]
CONFIG = Path(__file__).parents[2] / "configs" / "nano.toml"


@pytest.mark.slow
def test_a_short_run_resumes_and_its_checkpoint_chats(minicpm: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["pretrain", str(CONFIG), "--out", str(out), "schedule.total_steps=4", "schedule.warmup=1"]
    run = minicpm(*arguments, timeout=250)
    assert run.returncode == 0, run.stderr
    manifest = json.loads((out / "step_000004" / "manifest.json").read_text())
    assert manifest["step"] == 4
    assert (out / "loss.png").stat().st_size > 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    spoken = minicpm("generate", str(out / "step_000004"), "def ", "--max-tokens", "4", "--json")
    assert spoken.returncode == 0, spoken.stderr
    assert len(json.loads(spoken.stdout)["token_ids"]) <= 4


def test_a_mistyped_field_is_one_line(minicpm: Command, tmp_path: Path) -> None:
    run = minicpm("pretrain", str(CONFIG), "--out", str(tmp_path / "run"), "schedule.steps=4")
    assert run.returncode == 2
    assert "did you mean schedule.total_steps?" in run.stderr
    assert not (tmp_path / "run").exists()
