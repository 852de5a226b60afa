"""A run as a repository of the hub: huggingface_hub against a server that speaks its API, never half a checkpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.e2e.test_history import CONFIG, source
from tests.unit.history.conftest import STEPS, weights_at
from tests.unit.history.hub_server import HubServer

from minicpm.architecture import ModelConfig
from minicpm.cli.main import run
from minicpm.errors import CheckpointError
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.history import History, Row
from minicpm.history.destination import open_destination
from minicpm.history.hub_destination import revision_name
from minicpm.history.naming import parse_step
from minicpm.history.publishing import publish
from minicpm.history.verification import verify

LAST = "model.layers.1.mlp.up_proj.weight"
__all__ = ["source"]
NAME = "model.layers.3.mlp.up_proj.weight"
Make = Callable[..., Path]
URL = "hf://me/tiny"
# Of huggingface_hub, about how it calls its own HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    constants = pytest.importorskip("huggingface_hub.constants")
    from huggingface_hub import HfFileSystem

    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", server.token)
    HfFileSystem.clear_instance_cache()
    yield server
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def send(source: History, steps: list[int], precision: str = "exact") -> int:
    with contextlib.closing(open_destination(URL)) as destination:
        return publish(source, destination, steps, "tiny", precision=precision)


def check_every_commit(hub: HubServer, folder: Path) -> list[list[tuple[int, str]]]:
    """Lay out each commit and verify it; return (step, precision) of each that is a history."""
    seen = []
    for number, (_, files) in enumerate(hub.commits):
        for path, content in files.items():
            (folder / str(number) / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / str(number) / path).write_bytes(content)
        if "history.json" in files:
            history = History(folder / str(number))
            assert verify(history) == []
            seen.append([(row.step, row.precision) for row in history.rows])
        else:
            assert "index.json" not in files
    return seen


def test_commits_revisions_and_reading(
    make_history: Make, hub: HubServer, tmp_path: Path, tiny_config: ModelConfig
) -> None:
    source = History(make_history(STEPS[:5]))
    assert send(source, source.steps[:3]) == hub.num_uploaded
    assert list(hub.tags) == ["step0-warmup-0", "step1-warmup-1K", "step50-stable-50K"]
    send(source, source.steps)
    assert list(hub.tags)[3:] == ["step100-stable-100K", "step150-stable-150K"]
    commits = len(hub.commits)
    assert send(source, source.steps) == 0
    assert (len(hub.commits), hub.num_uploaded) == (
        commits,
        sum(f.stat().st_size for f in (source.place.path / "objects").iterdir()),
    )
    seen = check_every_commit(hub, tmp_path / "commits")
    assert seen[:6] == [
        [(0, "base")], [(0, "base"), (1, "base")], [(0, "base"), (1, "base"), (50, "base")],
        [(0, "exact"), (1, "base"), (50, "base")], [(0, "exact"), (1, "exact"), (50, "base")],
        [(0, "exact"), (1, "exact"), (50, "exact")],
    ]  # fmt: skip
    there = History(URL)
    assert there.steps == source.steps
    assert verify(there) == []
    assert there[150].weight(NAME).data.tobytes() == weights_at(tiny_config, 150)[NAME].data.tobytes()
    then = History(f"{URL}@step50-stable-50K")
    assert then.steps == [0, 1, 50]
    assert then[50].weight(NAME).data.tobytes() == weights_at(tiny_config, 50)[NAME].data.tobytes()
    assert "## 中文" in hub.commits[-1][1]["README.md"].decode()
    name = parse_step(f"{URL}@150")
    assert name is not None
    assert (name.run, name.step) == (URL, 150)


def test_revisions_that_hold_models(source: Path, hub: HubServer, tmp_path: Path) -> None:
    path = Path(shutil.copytree(source, tmp_path / "tiny"))
    assert run(["history", "publish", str(path), URL, "--models", "granite", "--steps", "1,50"]) == 0
    assert list(hub.branches) == ["main"]
    assert "model.safetensors" not in hub.files("main")
    for step, tag in ((1, "step1-warmup-1K"), (50, "step50-stable-50K")):
        for name, content in hub.files(tag).items():
            (tmp_path / tag / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / tag / name).write_bytes(content)
        opened = open_checkpoint(tmp_path / tag)
        assert opened.config.model_type == "granite"
        assert opened.weights[LAST].data.tobytes() == weights_at(CONFIG, step)[LAST].data.tobytes()
        assert step in History(tmp_path / tag).steps
    commits = len(hub.commits)
    assert run(["history", "publish", str(path), URL, "--models", "granite", "--steps", "1,50"]) == 0
    assert len(hub.commits) == commits
    assert run(["history", "publish", str(path), str(tmp_path / "x"), "--models", "granite"]) == 2


@pytest.mark.slow
def test_killed_and_resumed(make_history: Make, hub: HubServer, tmp_path: Path) -> None:
    path = make_history(STEPS[:5])
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "minicpm", "history", "publish", str(path), URL]
    ends = []
    for number in (9, 14, 22, 31, 47):
        hub.num_requests = 0
        process = subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
        hub.victim = (process.pid, number)
        ends.append((process.communicate()[1][-300:], process.returncode))
    hub.victim = None
    assert [code for _, code in ends[:4]] == [-9] * 4, ends
    assert subprocess.run(command, env=os.environ | settings).returncode == 0
    assert check_every_commit(hub, tmp_path / "commits")[-1] == [(step, "exact") for step in STEPS[:5]]
    assert len(hub.tags) == 5
    # What was sent before it was killed is not sent again, but for the file that was on its way.
    assert hub.num_uploaded == sum(file.stat().st_size for file in (path / "objects").iterdir())


def test_what_cannot_be_published_there(
    make_history: Make, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = History(make_history(STEPS[:3]))
    for url in ("hf://tiny", "hf://me/tiny@main", "hf://datasets/me/tiny", "hf://me/tiny/sub"):
        with pytest.raises(CheckpointError, match="is no repository to publish to; write hf://OWNER/NAME"):
            open_destination(url)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match="cannot write hf://me/tiny"):
        send(source, [0])
    assert hub.commits == []
    monkeypatch.setenv("HF_TOKEN", hub.token)
    # Another process that commits meanwhile is not overwritten.
    with contextlib.closing(open_destination(URL)) as destination:
        destination.write("checkpoints/a.json", b"{}")
        hub.add("theirs", {**hub.commits[-1][1], "index.json": b"theirs"})
        with pytest.raises(CheckpointError, match="A commit has happened since"):
            destination.write("index.json", b"ours")
    assert hub.commits[-1][1]["index.json"] == b"theirs"
    hub.add("theirs", {"model.safetensors": b"x"})
    with pytest.raises(CheckpointError, match=r"is not empty and holds no history \(model.safetensors\)"):
        send(source, [0])


@pytest.mark.parametrize(
    ("step", "stage", "tokens", "name"),
    [
        (260_000, "stable", 1_022_000_000_000, "step260000-stable-1.02T"),
        (1, "warmup", 999, "step1-warmup-999"),
        (2, "decay", 1_000, "step2-decay-1K"),
        (3, "stable", 999_900, "step3-stable-1M"),
        (4, "a b/c", 15_340_000_000, "step4-a_b_c-15.3B"),
        (5, "..", 120_000, "step5-step-120K"),
    ],
)
def test_names_of_revisions(step: int, stage: str, tokens: int, name: str) -> None:
    assert revision_name(Row(step, tokens, stage, 0.0, {}, 0, False, "0" * 64)) == name
