"""What was published opens, verifies and says what it is; what cannot be published is one clear line."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.history.conftest import STEPS, Server, facts_at, weights_at

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.history import History, HistoryWriter
from minicpm.history.catalogue import Precision
from minicpm.history.destination import open_destination
from minicpm.history.publishing import publish
from minicpm.history.verification import verify

NAME = "model.layers.3.mlp.up_proj.weight"
Make = Callable[..., Path]
Serve = Callable[..., Server]


def send(source: History, url: Path | str, steps: list[int], precision: Precision = "exact", **settings: Any) -> int:
    with contextlib.closing(open_destination(str(url))) as destination:
        return publish(source, destination, steps, "tiny", precision=precision, **settings)


@pytest.fixture
def memory() -> Iterator[Any]:
    files = pytest.importorskip("fsspec").filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_a_folder_for_a_static_server(
    make_history: Make, serve: Serve, tmp_path: Path, tiny_config: ModelConfig
) -> None:
    source = History(make_history(STEPS[:6]))
    public = tmp_path / "public" / "tiny"
    sent = send(source, public, source.steps)
    assert sent == sum(file.stat().st_size for file in (public / "objects").iterdir())
    there = History(serve(public).url)
    assert there.steps == source.steps
    assert verify(there) == []
    assert all(row.is_published and row.precision == "exact" for row in there.rows)
    assert there[150].weight(NAME).data.tobytes() == weights_at(tiny_config, 150)[NAME].data.tobytes()
    card = (public / "README.md").read_text()
    assert f"`{there.rows[-1].manifest_sha256}`" in card
    assert "| stable | 50–200 | 4 | 200,000 | 0.01 | 4.9500 → 4.8000 |" in card
    assert "## 中文" in card
    assert not list(public.rglob(".partial-*"))
    # The same again sends nothing, and what is new goes beside what is there.
    before = (public / "index.json").read_bytes()
    assert send(source, public, source.steps) == 0
    assert (public / "index.json").read_bytes() == before


def test_base_layers_go_first(make_history: Make, memory: Any, tiny_config: ModelConfig) -> None:
    source = History(make_history(STEPS[:5]))
    seen: list[list[str]] = []

    def look(what: str, done: int, total: int) -> None:
        with contextlib.suppress(CheckpointError):
            there = History("memory://bucket/tiny")
            assert verify(there) == []
            seen.append([row.precision for row in there.rows])

    send(source, "memory://bucket/tiny", source.steps, on_progress=look)
    assert ["base"] * 5 in seen
    assert [sorted(states) for states in seen] == [sorted(states) for states in sorted(seen, key=_progress)]
    assert verify(History("memory://bucket/tiny")) == []
    send(source, "memory://other", [50, 150], "base")
    other = History("memory://other")
    assert np.array_equal(other.at(150, precision="base")[NAME], source.at(150, precision="base")[NAME])
    assert "Of 2 only the base layer is here yet" in memory.cat("/other/README.md").decode()
    send(source, "memory://other", [150])
    other.refresh()
    assert [row.precision for row in other.rows] == ["base", "exact"]
    assert other[150].weight(NAME).data.tobytes() == weights_at(tiny_config, 150)[NAME].data.tobytes()


def _progress(states: list[str]) -> tuple[int, int]:
    return len(states), states.count("exact")


def test_what_a_thinning_coded_anew_is_the_same_checkpoint(
    make_history: Make, tmp_path: Path, tiny_config: ModelConfig
) -> None:
    path = make_history(STEPS[:6])
    public = tmp_path / "public"
    send(History(path), public, [0, 150])
    published = (public / "index.json").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(path, other)
    from minicpm.history.thinning import ThinRule, thin

    with HistoryWriter(other) as writer:
        thin(writer, ThinRule(steps=(0, 150)))
    again = History(other)
    assert again.row(150).manifest_sha256 != History(path).row(150).manifest_sha256
    assert send(again, public, [0, 150]) == 0
    assert (public / "index.json").read_bytes() == published
    # Other weights under the same step are not.
    different = History(make_history(STEPS[:3], "different"))
    with HistoryWriter(different.place.path) as writer:
        writer.append(facts_at(150), weights_at(tiny_config, 200))
    different.refresh()
    with pytest.raises(CheckpointError, match="has another checkpoint of step 150, with other weights"):
        send(different, public, [150])


def test_destinations_that_are_no_good(make_history: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = History(make_history(STEPS[:3]))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match=r"foreign is not empty and holds no history \(thesis.tex\)"):
        send(source, foreign, [50])
    assert [file.name for file in foreign.iterdir()] == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="holds another history than"):
        send(source, make_history(STEPS[:2], "another", max_reads=8), [50])
    with pytest.raises(CheckpointError, match="is for reading; publish into a folder"):
        send(source, "https://example.org/tiny", [50])
    with pytest.raises(CheckpointError, match="nosuch:// cannot be opened"):
        send(source, "nosuch://example.org/tiny", [50])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"ftp://127.0.0.1:{free.getsockname()[1]}/tiny"
    with pytest.raises(CheckpointError, match=re.escape(f"cannot reach {closed}: Connection refused")):
        send(source, closed, [50])
    with pytest.raises(CheckpointError, match="no checkpoint of step 51"):
        send(source, tmp_path / "new", [51])
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"no room at .*new: [\d,]+ bytes are to come, 1 are free"):
        send(source, tmp_path / "new", [50])
    assert not (tmp_path / "new").exists()


def test_what_was_changed_on_the_way_is_found(make_history: Make, memory: Any) -> None:
    source = History(make_history(STEPS[:3]))
    send(source, "memory://tiny", source.steps)
    victim = max(memory.ls("/tiny/objects", detail=False), key=memory.size)
    content = bytearray(memory.cat(victim))
    content[77] ^= 1
    memory.pipe(victim, bytes(content))
    with pytest.raises(CheckpointError, match=r"is not what was sent, 1 problems: object .* its hash is not its name"):
        send(source, "memory://tiny", source.steps)
    # Cut short, as by a store that ended in the middle, it is sent again.
    memory.pipe(victim, bytes(content[:-5]))
    assert send(source, "memory://tiny", source.steps) == len(content)
