"""`minicpm history serve` in headless Chromium, with few and many checkpoints; what it refuses, over plain HTTP."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.e2e.browser_session import browse
from tests.unit.history.conftest import Server, serve

from minicpm.architecture import ModelConfig
from minicpm.formats.weight import Weight
from minicpm.history import About, Facts, History, HistoryWriter
from minicpm.history.place import Folder
from minicpm.history.scores import Score, Setting, add_scores
from minicpm.tokenizer.training import VocabularyConfig, train_vocabulary

__all__ = ["serve"]
CONFIG = ModelConfig(
    hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    head_dim=16, vocab_size=331, max_position_embeddings=512, scale_emb=12.0, scale_depth=1.4, dim_model_base=24.0,
    torch_dtype="bfloat16",
)  # fmt: skip
# Hundreds of checkpoints are written and read in seconds only where each is small.
SMALL = dataclasses.replace(CONFIG, hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1,
                            head_dim=8, vocab_size=40)  # fmt: skip
HOSTILE = "<img src=x onerror=alert(1)>"


def facts_at(number: int, count: int, parent: str | None = None) -> Facts:
    share = number / count
    stage = "warmup" if share < 0.1 else "stable" if share < 0.8 else "decay"
    return Facts(number * 10, tokens=number * 5120, stage=stage, lr=0.01, seed=7, parent=parent,
                 losses={"train": 5 - 3 * share, "heldout_bits_per_byte": 3 - share})  # fmt: skip


def write_run(folder: Path, count: int, files: dict[str, bytes], parent: str | None = None) -> None:
    """A run's folder with `count` checkpoints whose weights wander, and the records beside them."""
    random = np.random.default_rng(count)
    config = CONFIG if count < 100 else SMALL
    weights = {name: 0.05 * random.standard_normal(shape) for name, shape in config.weight_shapes().items()}
    with HistoryWriter(folder / "history", About(config, "0" * 64), files) as writer:
        for number in range(count):
            writer.append(
                facts_at(number, count, parent),
                {name: Weight.from_array(w.astype(np.float32), "BF16") for name, w in weights.items()},
            )
            for w in weights.values():
                w += 0.005 * random.standard_normal(w.shape)
    facts = [facts_at(number, count) for number in range(1, count)]
    rows = [{"step": f.step, "loss": f.losses["train"], "lr": f.lr, "stage": f.stage} for f in facts]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9', "utf-8")
    samples = [{"step": f.step, "prompt": "the ", "text": f"{HOSTILE} {f.step}"} for f in facts]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples), "utf-8")


@contextmanager
def served(run: Path) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "minicpm", "history", "serve", str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.stderr.read()
        yield url
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Those of a tokenizer."""
    pytest.importorskip("sentencepiece")
    words = tmp_path_factory.mktemp("words")
    train_vocabulary(["the quick brown fox jumps over the lazy dog\n" * 40], words, VocabularyConfig(vocab_size=320))
    return {path.name: path.read_bytes() for path in words.iterdir()}


def add_made_up_scores(run: Path) -> None:
    history = History(run)
    setting = Setting("piqa", "choice", "plain", 0, 200, "exact", "engine", "", 1, "0" * 64, "0" * 64)
    found = [
        Score(row.step, row.manifest_sha256, row.manifest_sha256, setting, {"acc": (0.5 + row.step / 1000, 0.03)})
        for row in history.rows
    ]
    add_scores(Folder(run / "history"), found)


@pytest.mark.slow
@pytest.mark.parametrize("count", [6, 60, 600])
def test_the_page(files: dict[str, bytes], tmp_path: Path, count: int) -> None:
    write_run(tmp_path / "run", count, files)
    write_run(tmp_path / "branch", 2, {}, parent=f"run@10 {'0' * 64}")
    write_run(tmp_path / "other", 2, {}, parent=f"elsewhere@10 {'0' * 64}")
    if count == 6:
        add_made_up_scores(tmp_path / "run")
    with served(tmp_path / "run") as url:
        seen = browse("history", url, tmp_path, *(["generate"] if count == 6 else []))
    assert seen["foreign"] == []
    assert seen["errors"] == []
    assert seen["axe"] == []
    last = (count - 1) * 10
    assert seen["count"] == count
    assert seen["last"] == seen["end"] == f"step {last}, decay"
    assert seen["home"].startswith("step 0,")
    assert seen["right"].startswith("step 10,")
    assert seen["pageUp"].startswith(f"step {min(110, last)},")
    assert seen["picked"].startswith("step ")
    assert seen["picked"] != seen["end"]
    assert seen["curves"] == (4 if count == 6 else 3)
    assert seen["scores"] == (["piqa acc, ± standard error"] if count == 6 else [])
    assert seen["bars"] == (6 if count == 6 else 0)
    assert seen["stages"] == 3 if count > 6 else seen["stages"] >= 2
    # As text, never as a tag.
    assert seen["samples"] == [f"the {HOSTILE} {last}"]
    assert [row.startswith(name) for row, name in zip(
        seen["table"], ["embed_tokens", "layer 0", "layer 1", "norm", "all"], strict=True
    )] == [True] * 5  # fmt: skip
    assert all(colours > 3 for colours in seen["colours"])
    assert seen["branches"] == ["run", "branch"]
    assert f"step{last:,}" in seen["manifest"]
    assert seen["compared"] == [f"step {last:,} decay", "step 0 warm-up"]
    assert seen["chinese"] == "分支"
    if count == 6:
        assert seen["made"] != seen["samples"]
        assert HOSTILE not in seen["made"][0]


@pytest.mark.slow
def test_a_history_at_a_url(files: dict[str, bytes], tmp_path: Path, serve: Callable[..., Server]) -> None:
    """As a published one: by range requests, curves from the index, samples made from the weights."""
    write_run(tmp_path / "run", 3, files)
    add_made_up_scores(tmp_path / "run")
    source = serve(tmp_path / "run" / "history").url
    with served(source) as url:

        def ask(path: str) -> dict[str, Any]:
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
            connection.request("GET", path)
            response = connection.getresponse()
            value: dict[str, Any] = json.loads(response.read())
            connection.close()
            assert response.status == 200, value
            return value

        run = ask("/api/run")
        assert [row["step"] for row in run["checkpoints"]] == [0, 10, 20]
        assert [point[0] for point in run["train"]] == [0, 10, 20]
        assert [series["label"] for series in run["scores"]] == ["piqa acc"]
        assert [branch["name"] for branch in run["branches"]] == [source.rpartition("/")[2]]
        assert ask("/api/layers?step=20")["previous"] == 10
        assert ask("/api/manifest?step=10")["tokens"] == 5120
        assert ask("/api/samples?step=10") == {"step": None, "samples": []}
        assert [sample["prompt"] for sample in ask("/api/generate?step=20")["samples"]] == [
            "The ",
            "Once upon a time",
            "def ",
        ]


def test_what_the_server_refuses(minicpm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    write_run(tmp_path / "run", 3, {})
    with served(tmp_path / "run") as url:
        port = int(url.rpartition(":")[2])

        def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            text = response.read().decode()
            connection.close()
            return response.status, text, response.headers

        status, text, told = ask("/")
        assert status == 200
        assert "<script>" not in text
        assert "default-src 'none'; script-src 'self'" in told["Content-Security-Policy"]
        status, text, _ = ask("/api/layers?step=10")
        assert status == 200
        assert json.loads(text)["previous"] == 0
        for path, headers, status, part in (
            ("/", {"Host": "evil.example"}, 403, "this machine"),
            ("/api/run", {"Host": f"evil.example:{port}"}, 403, "this machine"),
            ("/api/run", {"Sec_Fetch_Site": "cross-site"}, 403, "another page"),
            ("/api/layers?step=15", {}, 422, "no checkpoint of step 15; the nearest are"),
            ("/api/layers?step=x", {}, 400, "must be a number"),
            ("/api/layers", {}, 400, "must be a number"),
            ("/api/generate?step=10", {}, 422, ""),
            ("/../history.json", {}, 404, "there is no"),
            ("/assets/..%2f..%2fstudy.py", {}, 404, "there is no"),
        ):
            found, text, _ = ask(path, **headers)
            assert found == status, (path, text)
            assert part in json.loads(text)["error"]
        assert ask("/api/run", "POST")[0] == 501
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, part in (
            ((str(tmp_path / "run"), "--port", str(taken.getsockname()[1])), "give another --port"),
            ((str(tmp_path / "run"), "--port", "70000"), "give another --port"),
            ((str(tmp_path / "none"),), "there is no run"),
            ((str(tmp_path),), "is no history"),
        ):
            result = minicpm("history", "serve", *arguments, timeout=60)
            assert result.returncode == 2, result
            assert part in result.stderr
            assert "Traceback" not in result.stderr


def test_infinite_values_and_steps_made_twice(tmp_path: Path) -> None:
    """What JSON cannot hold is left out, and of samples that a resumed run made again the later stay."""
    from minicpm.history.study import Study

    write_run(tmp_path / "run", 3, {})
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "prompt": "the ", "text": "again"}) + "\n")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 21, "loss": NaN}\n')
    study = Study(str(tmp_path / "run"))
    assert study.samples(20) == {"step": 20, "samples": [{"prompt": "the ", "text": "again"}]}
    json.dumps(study.overview(), allow_nan=False)
    assert [row[0] for row in study.overview()["train"]] == [10, 20]
    assert study.manifest(10)["tokens"] == dataclasses.asdict(facts_at(1, 3))["tokens"]
