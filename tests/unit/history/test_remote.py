"""Histories behind URLs: few requests, by range; and every way in which that goes wrong is one clear line."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.unit.history.conftest import STEPS, Server, weights_at

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.history import History
from minicpm.history.transfer import pull
from minicpm.history.verification import verify
from minicpm.history.web import cut_ranges, merge_ranges

NAME = "model.layers.3.mlp.up_proj.weight"
Make = Callable[..., Path]
Serve = Callable[..., Server]


@pytest.mark.parametrize("step", [0, 300, 350, 500])
def test_one_tensor_over_http_takes_few_requests(
    make_history: Make, serve: Serve, tiny_config: ModelConfig, step: int
) -> None:
    path = make_history()
    server = serve(path)
    history = History(server.url)
    entry = history[step].manifest.tensors[NAME]
    chunks = sum(len(e.pieces) for part in entry.parts for e in part.extents(True))
    array = history[step][NAME]
    assert np.array_equal(array, weights_at(tiny_config, step)[NAME].decode())
    assert len(server.requests) <= chunks + 3
    assert all(asked for file, asked in server.requests if file.startswith("/objects/"))


def test_a_deep_check_and_a_pull_over_http(make_history: Make, serve: Serve, tmp_path: Path) -> None:
    path = make_history()
    history = History(serve(path).url)
    assert verify(history) == []
    copy = tmp_path / "copy"
    fetched = pull(history, copy, history.steps)
    assert fetched == sum(file.stat().st_size for file in (path / "objects").iterdir())
    assert verify(History(copy)) == []
    for file in path.rglob("*.json"):
        assert (copy / file.relative_to(path)).read_bytes() == file.read_bytes()
    assert pull(history, copy, history.steps) == 0


def test_a_pull_of_a_few_steps_at_base_precision(make_history: Make, tmp_path: Path, tiny_config: ModelConfig) -> None:
    source = History(make_history())
    copy = tmp_path / "copy"
    fetched = pull(source, copy, [300, 500], "base")
    assert 0 < fetched < sum(source[500].manifest.objects.values())
    # Of all steps together, as of a run that is looked at from afar.
    whole = sum(file.stat().st_size for file in (tmp_path / "history" / "objects").iterdir())
    assert 0 < pull(source, tmp_path / "all", source.steps, "base") <= 0.6 * whole
    small = History(copy)
    assert verify(small) == []
    assert np.array_equal(small.at(500, precision="base")[NAME], source.at(500, precision="base")[NAME])
    with pytest.raises(CheckpointError, match="of step 500 only the base layer was published; ask for precision base"):
        small[500]
    # Taking the rest later completes it, and a base layer never takes the place of what is exact.
    pull(source, copy, [500])
    pull(source, copy, [500], "base")
    small.refresh()
    assert small[500].weight(NAME).data.tobytes() == weights_at(tiny_config, 500)[NAME].data.tobytes()
    assert verify(small) == []


def test_a_damaged_source_is_not_pulled(make_history: Make, tmp_path: Path) -> None:
    path = make_history(STEPS[:3])
    refinement = History(path)[50].manifest.tensors[NAME].parts[0].refinement
    assert refinement is not None
    victim = path / "objects" / refinement.object
    content = bytearray(victim.read_bytes())
    content[99] ^= 4
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"object {victim.name[:16]}… of .* was changed"):
        pull(History(path), tmp_path / "copy", [50])
    # Its base layer is whole; what needs the damaged object is not listed.
    copy = History(tmp_path / "copy")
    assert [row.precision for row in copy.rows] == ["base"]
    assert verify(copy) == []
    with pytest.raises(CheckpointError, match="holds another history"):
        pull(History(path), make_history(name="other", max_reads=8), [50])


def test_a_server_without_ranges(make_history: Make, serve: Serve) -> None:
    history = History(serve(make_history(STEPS[:3]), knows_ranges=False).url)
    with pytest.raises(CheckpointError, match=r"answers range requests with whole files.*minicpm history pull"):
        history[50][NAME]


def test_nobody_answers(serve: Serve, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(CheckpointError, match=r"cannot read .*history\.json: .*refused.*check the address"):
        History(address)
    with pytest.raises(CheckpointError, match=r"is no history: it has no history\.json"):
        History(serve(tmp_path).url)
    with pytest.raises(CheckpointError, match="is no address"):
        History("http://")


def test_objects_that_are_gone_or_cut(make_history: Make, serve: Serve) -> None:
    path = make_history(STEPS[:3])
    history = History(serve(path).url)
    extent = history[50].manifest.tensors[NAME].parts[0].frames[-1]
    victim = path / "objects" / extent.object
    content = victim.read_bytes()
    for length, message in ((extent.first, "truncated"), (extent.first + 1, "truncated")):
        victim.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=message):
            history[50][NAME]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"step 50: {NAME} needs an object that is not there"):
        history[50][NAME]


def test_any_fsspec_url(make_history: Make, tiny_config: ModelConfig) -> None:
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    path = make_history(STEPS[:4])
    files.put(str(path), "/run", recursive=True)
    try:
        history = History("memory://run")
        assert np.array_equal(history[100][NAME], weights_at(tiny_config, 100)[NAME].decode())
        assert verify(history) == []
        with pytest.raises(CheckpointError, match="memory://nothing is no history"):
            History("memory://nothing")
        with pytest.raises(CheckpointError, match="nosuchthing:// cannot be opened"):
            History("nosuchthing://a/b")
    finally:
        files.rm("/run", recursive=True)


def test_ranges_that_touch_are_one() -> None:
    ranges = [("b", 5, 5), ("a", 0, 10), ("a", 20, 5), ("a", 10, 10), ("a", 30, 1)]
    merged = merge_ranges(ranges)
    assert merged == [("a", 0, 25), ("a", 30, 1), ("b", 5, 5)]
    contents = [bytes(range(first, first + length)) for _, first, length in merged]
    assert cut_ranges(ranges, merged, contents) == [bytes(range(f, f + n)) for _, f, n in ranges]
