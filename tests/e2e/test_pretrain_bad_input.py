"""Whatever is wrong is said in one line with exit code 2, before the model is built: file, line, field, what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests import tiny_run

from minicpm.cli.main import run
from minicpm.train import pretrain

MODEL = """\
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
MIX = '[[stage.mix]]\nname = "{name}"\nweight = {weight}\n'
GOOD = STAGE.format(name="web", path="x.txt", weight=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.toml` and a finished `run` of four steps."""
    home = tmp_path_factory.mktemp("finished")
    with tiny_run.quick_runs():
        tiny_run.make_home(home)
        template = home / "tiny.toml"
        steps = template.read_text().replace("= 20", "= 4").replace("warmup = 3", "warmup = 1")
        # The files of a history would be counted where the disk has room for a certain number of files.
        template.write_text(steps.replace("= 5\n", "= 2\n") + '[checkpoint]\nhistory = "off"\n')
        tiny_run.go(tiny_run.load(home), home / "run")
    return home


@pytest.fixture(autouse=True)
def _no_model(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*arguments: object) -> None:
        raise AssertionError("the model was built although the input is bad")

    monkeypatch.setattr(pretrain, "new_state", built)
    # The test's own process is not to be started again.
    monkeypatch.setenv("MINICPM_ALLOCATOR_SET", "1")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return tiny_run.write_text(tmp_path / "text.jsonl")


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line of error that a command ends with."""
    code = run(list(arguments))
    written = capsys.readouterr()
    lines = [line for line in written.err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert written.err.splitlines()[-1:] == lines
    assert written.out == ""
    return lines[0]


def fails_with(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str, *more: str) -> str:
    path = tmp_path / "bad.toml"
    path.write_text(config)
    return fails(capsys, "pretrain", str(path), "--out", str(tmp_path / "run"), *more)


@pytest.mark.parametrize(
    ("config", "line", "expected"),
    [
        (MODEL, None, "the run names no data"),
        (MODEL + STAGE.format(name="a", path="x", weight=0.5), 17, "weights of stage stable sum to 0.5, not 1"),
        (MODEL + GOOD.replace("1\n", "-1\n"), 22, "stage[0].mix[0].weight of web must be a positive share"),
        (MODEL + STAGE.format(name="a", path="", weight=1), 19, "mixture name 'a' is unknown: no stage gives it a"),
        (
            MODEL + GOOD + '[[stage]]\nname = "decay"\n' + MIX.format(name="wab", weight=1),
            25,
            "mixture name 'wab' is unknown: no stage gives it a path; did you mean web?",
        ),
        (MODEL + GOOD.replace("stable", "stabel"), 18, "unknown stage 'stabel'; did you mean stable?"),
        (MODEL.replace("total_steps", "total_step") + GOOD, 10, "did you mean schedule.total_steps?"),
        (MODEL.replace("[batch]", "[bach]") + GOOD, 11, "unknown field bach; did you mean batch?"),
        (MODEL.replace("= 10", '= "ten"') + GOOD, 10, "schedule.total_steps must be int, got 'ten'"),
        (MODEL.replace("= 32", "= 5000") + GOOD, 12, "exceeds model.max_position_embeddings 4096"),
        (MODEL + "[", None, "is not valid TOML: Invalid"),
        (MODEL.replace("[batch]", "[batch]\nsequences = [2, 4]") + GOOD, 12, "is a ramp of 2 sizes and needs ramp"),
        (MODEL.replace("= 10", "= 10\nwarmup = 6\ndecay = 6") + GOOD, None, "exceed total_steps 10"),
        (MODEL.replace('"bad"', '"../bad"') + GOOD, 1, "name must be a plain folder name"),
    ],
)
def test_configurations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str, line: int | None, expected: str
) -> None:
    error = fails_with(capsys, tmp_path, config)
    assert expected in error
    assert f"bad.toml:{line}: " in error if line else "bad.toml" in error
    assert not (tmp_path / "run").exists()


def test_settings_of_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = MODEL + STAGE.format(name="a", path="absent.jsonl", weight=1)
    error = fails_with(capsys, tmp_path, config, "schedule.kind=wsd-cubic")
    assert "override 'schedule.kind=wsd-cubic': schedule.kind must be one of 'wsd-exp'" in error
    assert "'much' is no size" in fails_with(capsys, tmp_path, config, "--memory", "much")
    assert "the run takes" in fails_with(capsys, tmp_path, config, "--memory", "1MB")
    assert "loop.device 'abacus' cannot be used here" in fails_with(capsys, tmp_path, config, "loop.device=abacus")
    assert "absent.jsonl does not exist" in fails_with(capsys, tmp_path, config)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "fine"}\n{"text": "not\n', "text.jsonl:2: not valid JSON: "),
        ('{"text": "fine"}\n\n["a"]\n', "text.jsonl:3: the row is a JSON list; an object with fields is expected"),
        ('{"txt": "fine"}\n', "text.jsonl:1: field 'text' is missing; the row has 'txt'"),
        ('{"text": "fine"}\n{"text": 5}\n', "text.jsonl:2: field 'text' is int, expected text"),
        ("", "text.jsonl"),
        ('{"text": ""}\n', "text.jsonl"),
    ],
)
def test_rows_of_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: Path, content: str, expected: str
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(content)
    config = MODEL + STAGE.format(name="a", path=path, weight=1)
    error = fails_with(capsys, tmp_path, config)
    assert expected in error
    assert str(path) in error
    # The same with a tokenizer that need not be learned.
    error = fails_with(capsys, tmp_path, config, f"tokenizer.path={finished / 'first' / 'tokenizer'}")
    assert expected in error
    assert str(path) in error


def test_tokenizers_and_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path, finished: Path) -> None:
    mine, other, shards = finished / "first" / "tokenizer", tmp_path / "other", tmp_path / "shards"
    assert run(["data", "tokenizer", str(text), "--vocab-size", "390", "--out", str(other)]) == 0
    assert run(["data", "tokenize", str(text), "--tokenizer", str(other), "--out", str(shards)]) == 0
    capsys.readouterr()
    sharded = MODEL + STAGE.format(name="a", path=shards, weight=1)
    error = fails_with(capsys, tmp_path, sharded, f"tokenizer.path={mine}")
    assert f"{shards} was tokenized with another tokenizer (" in error
    assert json.loads((shards / "manifest.json").read_text())["tokenizer_hash"][:12] in error
    small = sharded.replace("vocab_size = 400", "vocab_size = 370")
    assert "set model.vocab_size=400" in fails_with(capsys, tmp_path, small, f"tokenizer.path={mine}")
    assert "begin a new run" in fails_with(capsys, tmp_path, sharded, f"tokenizer.path={other}")
    limited = MODEL + STAGE.format(name="a", path=text, weight=1) + "max_epochs = 0.001\n"
    assert "its max_epochs is 0.001" in fails_with(capsys, tmp_path, limited, f"tokenizer.path={mine}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["decay", "runs/none", "--steps", "3"], "is not of the form RUN@STEP"),
        (["decay", "runs/none@3", "--steps", "3"], "there is no run 'runs/none'"),
        (["decay", "{here}@3", "--steps", "3"], "has no checkpoint of step 3; it has none"),
        (["decay", "{run}@3", "--steps", "3"], "has no checkpoint of step 3; the nearest are 2, 4"),
        (["decay", "{run}@4", "--steps", "3"], "is in its decay stage; branch from a stable checkpoint"),
        (["decay", "{here}@3", "--steps", "0"], "--steps must be at least 1"),
        (["decay", "{here}@3", "--steps", "3", "--mix", "a.txt"], "is not of the form PATH:SHARE"),
        (["plan", "absent.toml"], "cannot read absent.toml"),
        (["pretrain", "absent.toml", "--resum"], "did you mean --resume?"),
        (["pretrain", "{toml}", "--out", "{run}"], "holds checkpoints up to step_000004; go on with --resume, or"),
        (["pretrain", "{toml}", "--out", "{run}", "--resume"], "is complete: step 4 of 4; raise schedule.total_steps"),
        (
            ["pretrain", "{toml}", "--out", "{run}", "--resume", "model.hidden_size=64"],
            "step_000004 was made with model.hidden_size = 48, and now it is 64; set it back, or begin another run",
        ),
    ],
)
def test_verbs_and_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: Path, arguments: list[str], expected: str
) -> None:
    names = {"here": tmp_path, "run": finished / "run", "toml": finished / "tiny.toml"}
    assert expected in fails(capsys, *(argument.format(**names) for argument in arguments))


def test_a_checkpoint_whose_content_is_another_models(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished / "run", copy)
    weights = copy / "step_000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    error = fails(capsys, "decay", f"{copy}@2", "--steps", "2", "--out", str(tmp_path / "decayed"))
    assert "step_000002: model.safetensors was changed (its hash differs" in error
    shutil.rmtree(copy / "step_000004")
    error = fails(capsys, "pretrain", str(finished / "tiny.toml"), "--out", str(copy), "--resume")
    assert "has no whole checkpoint to resume (1 are broken, see above)" in error


@pytest.mark.slow
def test_a_disk_that_is_full_before_and_during_a_save(tmp_path: Path, finished: Path) -> None:
    """A real file system: of half a megabyte; then one with room for bytes, but not for the files of a second save."""
    before = pretrain_on("size=500k", finished, tmp_path / "before")
    assert before.returncode == 2
    error = before.stderr.splitlines()[-1]
    assert error.startswith("error: a checkpoint takes 1 MB and the disk has 0 MB free; make room on the disk of")
    during = pretrain_on("size=30m,nr_inodes=19", finished, tmp_path / "during")
    lines = during.stderr.splitlines()
    warning = next(line for line in lines if line.startswith("WARNING"))
    assert "step 4 was NOT saved: " in warning
    assert "No space left on device" in warning
    assert "the last good checkpoint is step_000002" in warning
    error = next(line for line in lines if line.startswith("error: "))
    assert "the run reached step 4, but its checkpoint could not be written" in error
    assert lines[lines.index(error) + 1] == "exit 2"
    # With room made, it goes on from the second step to the same bits.
    assert during.returncode == 0, during.stderr
    assert "going on after step 2 of" in during.stderr
    assert tiny_run.hashes(tmp_path / "during" / "step_000004") == tiny_run.hashes(finished / "run" / "step_000004")


def pretrain_on(options: str, finished: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Run `minicpm pretrain` on a file system of its own; if it fails after a save, again with room made."""
    if os.geteuid():
        pytest.skip("only root may mount a small file system; a limit on file sizes is tested in invariants")
    out.mkdir()
    script = """
        disk=$(mktemp -d "$0/disk.XXXX"); mount -t tmpfs -o "$1" tmpfs "$disk" || exit 77
        "$2" -m minicpm pretrain "$3" --out "$disk/run"; code=$?
        [ -d "$disk/run/step_000002" ] || exit $code
        echo "exit $code" >&2
        mount -o remount,nr_inodes=0 "$disk" && "$2" -m minicpm pretrain "$3" --out "$disk/run" --resume || exit $?
        cp -r "$disk/run/step_000004" "$0"
    """
    found = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, str(out), options, sys.executable, str(finished / "tiny.toml")],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if found.returncode in {1, 77} and "Traceback" not in found.stderr:
        pytest.skip(f"no file system can be mounted here: {found.stderr.strip()}")
    return found
