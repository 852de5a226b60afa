"""`minicpm history eval` through the real command: scored once, gone on with, shown everywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.test_history import source

from minicpm.cli.main import run
from minicpm.history import History, HistoryWriter
from minicpm.history.study import Study

Command = Callable[..., "subprocess.CompletedProcess[str]"]
PIQA = [{"goal": f"the quick {n}", "sol1": "brown fox", "sol2": "lazy dog", "label": n % 2} for n in range(12)]
__all__ = ["source"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "piqa_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    return folder


@pytest.mark.slow
def test_scores_over_a_run(minicpm: Command, source: Path, data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "tiny")
    home = {"MINICPM_HOME": str(tmp_path / "home")}
    work = tmp_path / "work"
    command = ["history", "eval", str(folder), "--tasks", "piqa", "--data", str(data), "--out", str(work)]
    first = minicpm(*command, "--steps", "50:150:50", **home)
    assert first.returncode == 0, first.stderr
    assert [line.split()[0] for line in first.stdout.splitlines()[1:]] == ["50", "100", "150"]
    kept = json.loads((folder / "history" / "scores.json").read_text())["scores"]
    assert [score["step"] for score in kept] == [50, 100, 150]
    results = json.loads((work / "step-100" / "results.json").read_text())["scorings"][0]["figures"]
    assert {f["metric"]: f["value"] for f in results} == {m: v for m, (v, _) in kept[1]["figures"].items()}
    # The model alone says the same.
    alone = minicpm(
        "eval", f"{folder}@100", "--tasks", "piqa", "--data", str(data), "--out", str(tmp_path / "alone"), **home
    )
    assert first.stdout.splitlines()[2].split()[2] in alone.stdout
    # What was scored is not scored again, also where its samples are gone.
    shutil.rmtree(work)
    again = minicpm(*command, "--every", "100", **home)
    assert again.returncode == 0, again.stderr
    assert "step 100, 2 of 3: scored already" in again.stderr
    assert not (work / "step-100").exists()
    assert [line.split()[0] for line in again.stdout.splitlines()[1:]] == ["0", "100", "450"]
    assert (work / "scores.png").read_bytes().startswith(b"\x89PNG")
    # And stands wherever the run is looked at.
    listed = minicpm("history", "ls", str(folder)).stdout.splitlines()
    assert listed[0].endswith("piqa acc")
    assert [line.split()[0] for line in listed[1:] if line.split()[-1].startswith("0.")] == [
        "0",
        "50",
        "100",
        "150",
        "450",
    ]
    assert "piqa acc 0." in minicpm("history", "show", f"{folder}@100").stdout
    (series,) = Study(str(folder)).overview()["scores"]
    assert [point[0] for point in series["points"]] == [0, 50, 100, 150, 450]
    drawn = minicpm("history", "plot", str(folder), "--score", "piqa", "--out", str(tmp_path / "piqa.svg"))
    assert drawn.returncode == 0, drawn.stderr
    base = minicpm(*command, "--steps", "last", "--precision", "base", **home)
    assert base.returncode == 0, base.stderr
    assert (work / "step-450-base" / "results.json").is_file()
    published = minicpm("history", "publish", str(folder), str(tmp_path / "public"), "--steps", "100,150")
    assert published.returncode == 0, published.stderr
    assert "| piqa acc | 12 | " in (tmp_path / "public" / "README.md").read_text()
    assert [p["points"][0][0] for p in Study(str(tmp_path / "public")).overview()["scores"]] == [100]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--tasks NAME"]),
        (["--tasks", "pika", "--data", "DATA"], ["did you mean piqa"]),
        (["--tasks", "piqa", "--data", "DATA", "--limit", "0"], ["--limit must be at least 1"]),
        (["--tasks", "piqa", "--data", "DATA", "--every", "0"], ["--every must be at least 1"]),
        (["--tasks", "piqa", "--data", "DATA", "--steps", "9:1"], ["no checkpoint lies in '9:1'"]),
        (["--tasks", "piqa", "--data", "DATA", "--steps", "1:9:0"], ["is no range of steps"]),
        (["--tasks", "piqa", "--data", "DATA", "--steps", "7"], ["no checkpoint of step 7"]),
        (["--tasks", "piqa", "--data", "DATA/none"], ["is no folder"]),
    ],
)
def test_bad_input_is_one_line(
    source: Path, data: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.replace("DATA", str(data)) for argument in arguments]
    assert run(["history", "eval", str(source), *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert all(part in said for part in parts), said
    assert not (source / "history" / "scores.json").exists()


def test_a_history_without_checkpoints(
    source: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = shutil.copytree(source, tmp_path / "empty")
    with HistoryWriter(empty / "history") as writer:
        writer.replace_rows({})
    assert History(empty).steps == []
    assert run(["history", "eval", str(empty), "--tasks", "piqa", "--data", str(data)]) == 2
    assert "holds no checkpoint yet" in capsys.readouterr().err
