"""`--prompt-cache FILE` through the real command: the second question about a text begins where the first one did."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]
TEXT = "The capital of France is Paris, and that of Italy is Rome. " * 12
SHORT = ("--greedy", "--max-tokens", "3")


@pytest.fixture(autouse=True)
def model(smollm2_path: Path) -> Path:
    return smollm2_path


def test_a_prompt_is_computed_once_for_two_commands(minicpm: Command, tmp_path: Path) -> None:
    path = tmp_path / "text.cache"

    def generate(text: str) -> dict[str, object]:
        run = minicpm("generate", "smollm2", text, "--prompt-cache", str(path), "--json", *SHORT)
        assert (run.returncode, run.stderr) == (0, "")
        return json.loads(run.stdout)

    plain = json.loads(minicpm("generate", "smollm2", TEXT + "So Paris is", "--json", *SHORT).stdout)
    first = generate(TEXT + "Rome is")
    written = path.stat().st_mtime_ns
    second = generate(TEXT + "So Paris is")
    assert first["num_cached_tokens"] == plain["num_cached_tokens"] == 0
    assert second["num_cached_tokens"] >= 128
    assert second["token_ids"] == plain["token_ids"]
    # It held most of the second prompt, so it was left alone.
    assert path.stat().st_mtime_ns == written


def test_a_stale_file_is_told_and_replaced(minicpm: Command, tmp_path: Path) -> None:
    path = tmp_path / "text.cache"
    words = ("chat", "smollm2", TEXT + "Which is the capital of Italy?", "--prompt-cache", str(path), *SHORT)
    fresh = minicpm(*words)
    assert (fresh.returncode, fresh.stderr) == (0, "")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    told = minicpm(*words)
    assert (told.returncode, told.stdout) == (0, fresh.stdout)
    assert told.stderr.count("\n") == 1
    assert "computed anew" in told.stderr
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("name", "message"),
    [("diary.txt", "is no prompt cache of this version; give another name"), ("no/x", "there is no folder")],
)
def test_a_file_that_is_something_else_is_left_alone(minicpm: Command, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "diary.txt").write_text("Dear diary")
    run = minicpm("chat", "smollm2", TEXT, "--prompt-cache", str(tmp_path / name), *SHORT)
    assert (run.returncode, run.stdout) == (2, "")
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
    assert (tmp_path / "diary.txt").read_text() == "Dear diary"


def test_one_prompt_is_kept_and_a_short_one_is_not(minicpm: Command, tmp_path: Path) -> None:
    path = tmp_path / "x"
    run = minicpm("generate", "smollm2", "a", "b", "--prompt-cache", str(path), *SHORT)
    assert (run.returncode, run.stderr) == (2, "error: --prompt-cache keeps one prompt, and there are 2; give one\n")
    run = minicpm("generate", "smollm2", "a", "--prompt-cache", str(path), *SHORT)
    assert run.returncode == 0
    assert "from 32 on there is something to keep" in run.stderr
    assert not path.exists()
