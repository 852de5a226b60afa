"""`minicpm eval` as a person runs it: on the default model, with what goes wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minicpm.cli.main import run
from minicpm.eval import jail

PIQA = [
    {"goal": "make ice", "sol1": "put water into the freezer", "sol2": "put water into the oven", "label": 0},
    {
        "goal": "boil an egg",
        "sol1": "put it into a cold pan without water",
        "sol2": "put it into hot water",
        "label": 1,
    },
]
HUMANEVAL = {
    "task_id": "t/0",
    "prompt": 'def add(a, b):\n    """Return the sum of a and b."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "piqa_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    (folder / "HumanEval.jsonl").write_text(json.dumps(HUMANEVAL) + "\n")
    return folder


def test_a_run_its_page_and_its_comparison(
    data: Path, smollm2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tasks = "piqa,humaneval" if jail.supported() else "piqa"
    arguments = ["eval", str(smollm2_path), "--tasks", tasks, "--data", str(data), "--out", str(out), "--allow-code"]
    assert run(arguments) == 0
    said = capsys.readouterr()
    assert "piqa  " in said.out
    assert "1.0000" in said.out
    assert "2/2 rows" in said.err
    assert (out / "report.html").stat().st_size > 1000
    assert run(["eval", "--compare", str(out), str(out)]) == 0
    assert "+0.0000" in capsys.readouterr().out


def test_the_list_of_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "--list"]) == 0
    assert "hellaswag" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smollm2"], "--tasks"),
        (["smollm2", "--tasks", "pika", "--data", "DATA"], "did you mean piqa"),
        (["smollm2", "--tasks", "arc_easy", "--data", "DATA"], "holds no arc_easy_test.jsonl"),
        (["smollm2", "--tasks", "piqa", "--data", "DATA/none"], "is no folder"),
        (["smollm2", "--tasks", "humaneval", "--data", "DATA"], "--allow-code"),
        (["smollm2", "--tasks", "mt_bench", "--data", "DATA"], "--judge"),
        (["smollm2", "--tasks", "piqa", "--data", "DATA", "--limit", "0"], "--limit must be at least 1"),
        (["smollm2", "--tasks", "piqa", "--data", "DATA", "--shots", "-1"], "--shots must be at least 0, got -1"),
        (["smollm2", "--tasks", ",", "--data", "DATA"], "--tasks names none"),
        (["smollm2", "--tasks", "piqa", "--data", "DATA", "--dtype", "fp32"], "--dtype is for torch:PATH"),
        (["DATA/none.gguf", "--tasks", "piqa", "--data", "DATA"], "none.gguf"),
        (["http://127.0.0.1:9/v1", "--tasks", "piqa", "--data", "DATA"], "is the server running"),
        (["--compare", "DATA", "DATA"], "no finished evaluation"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.replace("DATA", str(data)) for argument in arguments]
    assert run(["eval", *arguments] + ([] if "--compare" in arguments else ["--out", str(tmp_path / "out")])) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out" / "results.json").exists()
