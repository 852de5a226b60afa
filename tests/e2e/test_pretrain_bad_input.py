"""Whatever is wrong is said in one line with exit code 2, before the model is built."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from minicpm.cli.main import run
from minicpm.train import pretrain

MODEL = """
name = "bad"
[model]
hidden_size = 48
intermediate_size = 80
num_hidden_layers = 2
num_attention_heads = 6
head_dim = 8
vocab_size = 400
[schedule]
total_steps = 10
[batch]
sequence_length = 32
[loop]
compile = "off"
[corpus]
heldout_share = 0
"""
STAGE = '[[stage]]\nname = "stable"\n[[stage.mix]]\nname = "{name}"\npath = "{path}"\nweight = {weight}\n'


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*arguments: object) -> None:
        raise AssertionError("the model was built although the input is bad")

    monkeypatch.setattr(pretrain, "new_state", built)
    # The test's own process is not to be started again.
    monkeypatch.setenv("MINICPM_ALLOCATOR_SET", "1")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    paragraphs = Path(argparse.__file__).read_text(encoding="utf-8").split("\n\n")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs if text.strip()))
    return path


def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str, *more: str) -> str:
    path = tmp_path / "bad.toml"
    path.write_text(config)
    code = run(["pretrain", str(path), "--out", str(tmp_path / "run"), *more])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MODEL, "the run names no data"),
        (MODEL + STAGE.format(name="a", path="x.txt", weight=0.5), "weights of stage stable sum to 0.5, not 1"),
        (MODEL + STAGE.format(name="a", path="", weight=1), "mixture name 'a' is unknown: no stage gives it a path"),
        (MODEL + STAGE.format(name="a", path="absent.jsonl", weight=1), "absent.jsonl"),
        (MODEL + STAGE.replace("stable", "stabel").format(name="a", path="x", weight=1), "did you mean stable?"),
        (MODEL.replace("total_steps", "total_step"), "unknown field schedule.total_step; did you mean schedule.total"),
        (MODEL.replace("= 10", '= "ten"'), "schedule.total_steps must be int, got 'ten'"),
        (
            MODEL.replace("= 32", "= 5000") + STAGE.format(name="a", path="x", weight=1),
            "exceeds model.max_position_embeddings 4096",
        ),
        (MODEL + "[", "is not valid TOML"),
        (MODEL.replace("[loop]", '[loop]\ndevice = "abacus"') + STAGE.format(name="a", path="x", weight=1), "abacus"),
        (MODEL.replace("[batch]", "[batch]\nsequences = [2, 4]"), "is a ramp of 2 sizes and needs ramp_steps"),
        (MODEL.replace("= 10", "= 10\nwarmup = 6\ndecay = 6"), "exceed total_steps 10"),
        (MODEL.replace('"bad"', '"../bad"'), "name must be a plain folder name"),
    ],
)
def test_configurations(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str, expected: str) -> None:
    assert expected in fails(capsys, tmp_path, config)


def test_rows_of_text(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path) -> None:
    config = MODEL + STAGE.format(name="a", path=text, weight=1)
    text.write_text(text.read_text().replace('{"text": ', '{"txt": ', 1))
    assert "text.jsonl:1: field 'text' is missing" in fails(capsys, tmp_path, config)
    text.write_text('{"text": "fine"}\n{"text": "not\n')
    assert "text.jsonl:2" in fails(capsys, tmp_path, config)
    text.write_text("")
    assert str(text) in fails(capsys, tmp_path, config)


def test_tokenizers_and_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path) -> None:
    config = MODEL + STAGE.format(name="a", path=text, weight=1)
    assert "the run takes" in fails(capsys, tmp_path, config, "--memory", "1MB")
    assert "'much' is no size" in fails(capsys, tmp_path, config, "--memory", "much")
    shards = tmp_path / "shards"
    other = tmp_path / "other"
    assert run(["data", "tokenizer", str(text), "--vocab-size", "390", "--out", str(other)]) == 0
    assert run(["data", "tokenize", str(text), "--tokenizer", str(other), "--out", str(shards)]) == 0
    sharded = MODEL + STAGE.format(name="a", path=shards, weight=1)
    mine = tmp_path / "mine"
    assert run(["data", "tokenizer", str(text), "--vocab-size", "380", "--out", str(mine)]) == 0
    error = fails(capsys, tmp_path, sharded, f"tokenizer.path={mine}")
    assert "was tokenized with another tokenizer" in error
    small = sharded.replace("vocab_size = 400", "vocab_size = 370")
    assert "set model.vocab_size=380" in fails(capsys, tmp_path, small, f"tokenizer.path={mine}")
    assert "begin a new run" in fails(capsys, tmp_path, sharded, f"tokenizer.path={other}")
    limited = MODEL + STAGE.format(name="a", path=text, weight=1) + "max_epochs = 0.001\n"
    assert "its max_epochs is 0.001" in fails(capsys, tmp_path, limited, f"tokenizer.path={mine}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["decay", "runs/none", "--steps", "3"], "is not of the form RUN@STEP"),
        (["decay", "runs/none@3", "--steps", "3"], "there is no run 'runs/none'"),
        (["decay", "{here}@3", "--steps", "3"], "has no checkpoint of step 3; it has none"),
        (["decay", "{here}@3", "--steps", "0"], "--steps must be at least 1"),
        (["decay", "{here}@3", "--steps", "3", "--mix", "a.txt"], "is not of the form PATH:SHARE"),
        (["plan", "absent.toml"], "cannot read absent.toml"),
        (["pretrain", "absent.toml", "--resum"], "did you mean --resume?"),
    ],
)
def test_other_verbs(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], expected: str) -> None:
    code = run([argument.format(here=tmp_path) for argument in arguments])
    assert code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1


def test_there_is_nothing_to_resume(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "run" / "step_000007"
    folder.mkdir(parents=True)
    config = MODEL + STAGE.format(name="a", path=text, weight=1)
    assert "1 are broken, see above" in fails(capsys, tmp_path, config, "--resume")
    assert "go on with --resume, or name another folder" in fails(capsys, tmp_path, config)
