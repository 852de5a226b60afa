"""`minicpm history` and RUN@STEP through the real command; what people give by mistake is one line and exit code 2."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.history.conftest import facts_at, weights_at

from minicpm.architecture import ModelConfig
from minicpm.history import About, History, HistoryWriter
from minicpm.history.transfer import pull
from minicpm.tokenizer.training import VocabularyConfig, train_vocabulary

Command = Callable[..., "subprocess.CompletedProcess[str]"]
STEPS = (0, 1, 50, 100, 150, 450)
CONFIG = ModelConfig(
    hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    head_dim=16, vocab_size=331, max_position_embeddings=512, scale_emb=12.0, scale_depth=1.4, dim_model_base=24.0,
    torch_dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a history in it."""
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("run")
    words = tmp_path_factory.mktemp("words")
    train_vocabulary(["the quick brown fox jumps over the lazy dog\n" * 40], words, VocabularyConfig(vocab_size=320))
    files = {path.name: path.read_bytes() for path in words.iterdir()}
    with HistoryWriter(folder / "history", About(CONFIG, "0" * 64), files) as writer:
        for step in STEPS:
            writer.append(facts_at(step), weights_at(CONFIG, step))
    return folder


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "tiny"))


def assert_one_line(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, result
    assert result.stderr.splitlines()[-1].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr


def test_listing_and_showing(minicpm: Command, source: Path) -> None:
    listed = minicpm("history", "ls", str(source))
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [str(step) for step in STEPS]
    assert "decay" in lines[-1]
    rows = json.loads(minicpm("history", "ls", str(source / "history"), "--stage", "stable", "--json").stdout)
    assert [row["step"] for row in rows] == [50, 100, 150]
    assert "331" not in minicpm("history", "show", str(source)).stderr
    shown = minicpm("history", "show", f"{source}@100", "--tensors")
    assert "coded_from" in shown.stdout
    assert "model.layers.1.mlp.up_proj.weight" in shown.stdout


def test_a_step_is_a_model_everywhere(minicpm: Command, source: Path, tmp_path: Path) -> None:
    home = {"MINICPM_HOME": str(tmp_path / "home")}
    spoken = minicpm("generate", f"{source}@100", "the quick", "--greedy", "--max-tokens", "4", "--json", **home)
    assert spoken.returncode == 0, spoken.stderr
    first = minicpm("history", "get", str(source), "--steps", "100", "--out", str(tmp_path / "model"))
    assert first.returncode == 0, first.stderr
    again = minicpm("generate", str(tmp_path / "model"), "the quick", "--greedy", "--max-tokens", "4", "--json", **home)
    assert json.loads(again.stdout)["token_ids"] == json.loads(spoken.stdout)["token_ids"]
    for name in (f"{source}@100:base", f"{source}@150"):
        compared = minicpm("compare", f"{source}@100", name, "--max-tokens", "32", "--json", **home)
        assert compared.returncode == 0, compared.stderr
        assert json.loads(compared.stdout)["mean_kl"] > 0
    converted = minicpm("convert", f"{source}@50", str(tmp_path / "m.gguf"), "--to", "gguf", "--no-verify", **home)
    assert converted.returncode == 0, converted.stderr
    assert (tmp_path / "m.gguf").stat().st_size > 0
    # A step that lies in the run as a folder is used as it is.
    assert len(list((tmp_path / "home" / "history").iterdir())) == 4


@pytest.mark.slow
def test_verify_diff_thin_publish_pull(minicpm: Command, run: Path, tmp_path: Path) -> None:
    assert "6 checkpoints, every tensor" in minicpm("history", "verify", str(run)).stdout
    found = json.loads(minicpm("history", "diff", f"{run}@50", f"{run}@100", "--json").stdout)
    assert [item["name"] for item in found] == ["embed_tokens", "layer 0", "layer 1", "norm", "all"]
    assert 0.2 < found[-1]["change"] < 0.5
    assert found[-1]["cosine"] > 0.9
    same = minicpm("history", "diff", f"{run}@50", f"{run}@50")
    assert "0.000%" in same.stdout.splitlines()[-1]
    assert minicpm("history", "publish", str(run), "--steps", "50").returncode == 0
    before = {row.step: row for row in History(run).rows}
    planned = minicpm("history", "thin", str(run), "--every", "150", "--early", "--dry-run")
    assert "5 of 6 would stay" in planned.stderr
    assert History(run).steps == list(STEPS)
    thinned = minicpm("history", "thin", str(run), "--every", "150", "--early")
    assert thinned.returncode == 0, thinned.stderr
    assert History(run).steps == [0, 1, 50, 150, 450]
    assert {row.step: row for row in History(run).rows}[50] == before[50]
    pulled = minicpm("history", "pull", str(run), str(tmp_path / "copy"), "--steps", "50,450", "--precision", "base")
    assert pulled.returncode == 0, pulled.stderr
    assert "base only" in minicpm("history", "ls", str(tmp_path / "copy")).stdout
    assert minicpm("history", "verify", str(tmp_path / "copy")).returncode == 0
    victim = max((run / "history" / "objects").iterdir(), key=lambda file: file.stat().st_size)
    victim.unlink()
    broken = minicpm("history", "verify", str(run), "--quick")
    assert f"object {victim.name[:16]}… is missing" in broken.stdout
    assert_one_line(broken, "1 problem in")


@pytest.mark.slow
def test_mistakes(minicpm: Command, source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    newer = Path(shutil.copytree(source / "history", tmp_path / "newer"))
    text = (newer / "history.json").read_text()
    (newer / "history.json").write_text(text.replace('"format_version": 1', '"format_version": 9'))
    pull(History(source), tmp_path / "base", [50], "base")
    for arguments, parts in (
        (("history", "ls", str(tmp_path / "empty")), ("is no history: it has no history.json",)),
        (("history", "ls", str(tmp_path / "nothing")), ("there is no run",)),
        (("history", "ls", str(newer)), ("format version 9", "upgrade minicpm")),
        (("history", "ls", closed), ("cannot read", "refused")),
        (("history", "ls", str(source), "--stage", "tail"), ("there are warmup, stable, decay",)),
        (("history", "show", f"{source}@51"), ("no checkpoint of step 51", "the nearest are 0, 1, 50, 100")),
        (("generate", f"{source}@51", "the"), ("no checkpoint of step 51",)),
        (("generate", f"{tmp_path / 'base'}@50", "the"), ("only the base layer", "ask for precision base")),
        (("history", "get", str(source), "--steps", "5x", "--out", "x"), ("is no list of steps",)),
        (("history", "get", str(source), "--out", str(tmp_path / "empty")), ("exists already",)),
        (("history", "diff", str(source), str(source)), ("is not of the form RUN@STEP",)),
        (("history", "thin", str(source)), ("say what stays",)),
        (("history", "look", str(source)), ("has no verb 'look'",)),
        (
            ("history", "import", str(tmp_path / "empty"), "--out", str(tmp_path / "i")),
            ("holds no checkpoints", "step1000"),
        ),
    ):
        assert_one_line(minicpm(*arguments), *parts)
