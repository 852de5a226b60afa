"""hf: and ms: against a hub on this machine: what comes, what is refused, and what is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from minicpm.errors import HubError
from minicpm.hub import list_models, pull, resolve
from minicpm.hub.reference import is_safe_path, parse

if TYPE_CHECKING:
    from conftest import FakeHub

WEIGHTS = bytes(range(256)) * 3000


@pytest.fixture
def folder_repo(hub: FakeHub) -> FakeHub:
    hub.files = {
        "config.json": b'{"a": 1}',
        "model.safetensors": WEIGHTS,
        "tokenizer.model": b"spm",
        "README.md": b"# tiny",
        "modeling_tiny.py": b"import os",
        "pytorch_model.bin": b"pickle",
        "model.Q4_0.gguf": b"gguf",
        "onnx/config.json": b"{}",
        ".gitattributes": b"x",
    }
    return hub


def hidden_files(home: Path) -> list[str]:
    return sorted(p.name for p in (home / "models").rglob("*") if p.is_file() and "/." in str(p.relative_to(home)))


@pytest.mark.parametrize("site", ["hf", "ms"])
def test_a_folder_comes_whole_and_without_code(folder_repo: FakeHub, home: Path, site: str) -> None:
    model = pull(f"{site}:acme/tiny")
    assert sorted(p.name for p in model.path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "source.json",
        "tokenizer.model",
    ]
    assert (model.path / "model.safetensors").read_bytes() == WEIGHTS
    assert "apache" in model.licence.lower()
    assert model.source == f"{folder_repo.url}/acme/tiny"
    assert resolve(f"{site}:acme/tiny") == model.path
    assert [m.name for m in list_models()] == [f"{site}:acme/tiny"]
    assert hidden_files(home) == []


def test_unsafe_files_come_only_when_asked_for(folder_repo: FakeHub, home: Path) -> None:
    model = pull("hf:acme/tiny", allow_unsafe=True)
    assert {"modeling_tiny.py", "pytorch_model.bin"} <= {f.path for f in model.files}
    with pytest.raises(HubError, match="can run code"):
        pull("hf:acme/tiny/pytorch_model.bin")


def test_a_second_pull_of_the_same_commit_fetches_nothing(folder_repo: FakeHub, home: Path) -> None:
    pull("hf:acme/tiny")
    folder_repo.requests.clear()
    pull("hf:acme/tiny")
    assert folder_repo.downloads() == []


def test_a_damaged_file_is_fetched_again(folder_repo: FakeHub, home: Path) -> None:
    model = pull("hf:acme/tiny")
    (model.path / "model.safetensors").write_bytes(WEIGHTS[::-1])
    assert (pull("hf:acme/tiny").path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_broken_connection_is_taken_up_where_it_stopped(folder_repo: FakeHub, home: Path) -> None:
    folder_repo.files = {"model.safetensors": WEIGHTS}
    folder_repo.cut_after_bytes = [100_000, 1, 300_000]
    model = pull("hf:acme/tiny")
    assert (model.path / "model.safetensors").read_bytes() == WEIGHTS
    spans = [span for _, span in folder_repo.downloads()]
    assert spans == [None, "bytes=100000-", "bytes=100001-", "bytes=400001-"]


def test_the_next_pull_goes_on_after_one_that_gave_up(folder_repo: FakeHub, home: Path) -> None:
    folder_repo.files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    folder_repo.cut_after_bytes = [2, 50_000, 0, 0, 0, 0, 0]
    with pytest.raises(HubError, match=r"broke at 50000 of 768000 bytes of model.safetensors .*go on from there"):
        pull("hf:acme/tiny")
    assert list_models() == []
    with pytest.raises(HubError, match="not here yet"):
        resolve("hf:acme/tiny")
    folder_repo.requests.clear()
    pull("hf:acme/tiny")
    assert [span for _, span in folder_repo.downloads()] == ["bytes=50000-"]
    assert hidden_files(home) == []


def test_a_server_without_ranges_sends_it_again(folder_repo: FakeHub, home: Path) -> None:
    folder_repo.files = {"model.safetensors": WEIGHTS}
    folder_repo.knows_ranges = False
    folder_repo.cut_after_bytes = [100_000]
    model = pull("hf:acme/tiny")
    assert (model.path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_busy_server_is_asked_again(folder_repo: FakeHub, home: Path) -> None:
    folder_repo.statuses = [503, 429, 500]
    pull("hf:acme/tiny")
    folder_repo.statuses = [403]
    with pytest.raises(HubError, match="403"):
        pull("hf:acme/tiny/model.Q4_0.gguf")


@pytest.mark.parametrize("path", ["config.json", "model.safetensors"], ids=["git-sha1", "sha256"])
def test_a_wrong_hash_leaves_no_model_and_not_the_file(folder_repo: FakeHub, home: Path, path: str) -> None:
    folder_repo.replaced = {path: folder_repo.files[path][::-1]}
    with pytest.raises(HubError, match=rf"{path} from http.* does not have the .*; it was deleted"):
        pull("hf:acme/tiny")
    assert list_models() == []
    assert path not in hidden_files(home)
    assert f"{path}.part" not in hidden_files(home)
    folder_repo.replaced = {}
    pull("hf:acme/tiny")


def test_more_bytes_than_listed_are_not_written(folder_repo: FakeHub, home: Path) -> None:
    folder_repo.replaced = {"model.safetensors": WEIGHTS + b"!"}
    with pytest.raises(HubError, match="sends more than the 768000 bytes"):
        pull("hf:acme/tiny")
    assert "model.safetensors.part" not in hidden_files(home)


def test_one_gguf_is_opened_as_a_file_and_of_many_one_must_be_named(hub: FakeHub, home: Path) -> None:
    hub.files = {"a.Q4_0.gguf": b"four", "a.Q8_0.gguf": b"eight", "README.md": b"x"}
    with pytest.raises(HubError, match=r"2 GGUF files; name one as hf:acme/tiny/FILE: a.Q4_0.gguf \(4 B\)"):
        pull("hf:acme/tiny")
    model = pull("hf:acme/tiny/a.Q8_0.gguf")
    assert model.path.read_bytes() == b"eight"
    assert resolve("hf:acme/tiny/a.Q8_0.gguf") == model.path
    with pytest.raises(HubError, match=r"no file 'b.gguf'; its weights: a.Q4_0.gguf, a.Q8_0.gguf"):
        pull("hf:acme/tiny/b.gguf")


def test_pickles_alone_are_named(hub: FakeHub, home: Path) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(HubError, match=r"no weights in safetensors or GGUF; it has pytorch_model.bin, a pickle"):
        pull("hf:acme/tiny")


def test_what_is_not_there(folder_repo: FakeHub, home: Path) -> None:
    with pytest.raises(HubError, match=r"answers 404 .*check the name"):
        pull("hf:acme/missing")
    with pytest.raises(HubError, match=r"answers 404"):
        pull("hf:acme/tiny@v9")
    assert not (home / "models").exists()


def test_a_mirror_that_cannot_be_reached_or_is_none(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.listing_override = b"<html>welcome</html>"
    with pytest.raises(HubError, match="does not answer with JSON; check HF_ENDPOINT"):
        pull("hf:acme/tiny")
    hub.listing_override = b'{"siblings": [{"rfilename": "a.safetensors"}], "sha": "x"}'
    with pytest.raises(HubError, match="does not list acme/tiny with sizes and hashes"):
        pull("hf:acme/tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"cannot reach 127.0.0.1: .*refused.* HF_ENDPOINT to a mirror"):
        pull("hf:acme/tiny")
    monkeypatch.setenv("HF_ENDPOINT", "ftp://127.0.0.1")
    with pytest.raises(HubError, match=r"HF_ENDPOINT is 'ftp://127.0.0.1'; it must be an address like https"):
        pull("hf:acme/tiny")


def test_the_token_goes_to_the_hub_and_not_to_the_store_it_redirects_to(
    folder_repo: FakeHub, store: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    pull("hf:acme/tiny")
    assert {authorization for _, _, authorization in folder_repo.requests} == {"Bearer secret"}
    store.files = {"model.Q4_0.gguf": b"gguf"}
    folder_repo.redirect_to = store.url
    pull("hf:acme/tiny/model.Q4_0.gguf")
    assert [authorization for _, _, authorization in store.requests] == [None]


@pytest.mark.parametrize(
    "evil", ["../evil.json", "/etc/evil.json", "..\\evil.json", "a/../../evil.json", "C:evil.json"]
)
def test_a_listing_cannot_write_outside(hub: FakeHub, home: Path, evil: str) -> None:
    hub.files = {"model.safetensors": b"x", evil: b"boo"}
    pull("hf:acme/tiny")
    assert not list(home.parent.rglob("*evil*"))
    with pytest.raises(HubError):
        pull(f"hf:acme/tiny/{evil}")


def test_references() -> None:
    assert str(parse("hf:a/b@v1/c/d.gguf")) == "hf:a/b@v1/c/d.gguf"
    assert parse("ms:a/b").revision is None
    for text in ("hf:a", "hf:a/b@", "hf:a/b/", "hf:../b", "hf:a/..", "xx:a/b", "hf:a/b/.git/config"):
        with pytest.raises(HubError):
            parse(text)
    assert is_safe_path("a/b.json")
    assert not is_safe_path("a//b.json")


def test_a_manifest_that_points_outside_is_no_model(folder_repo: FakeHub, home: Path) -> None:
    model = pull("hf:acme/tiny")
    manifest = json.loads((model.folder / "source.json").read_text())
    (home / "models" / "secret").write_text("x")
    manifest["files"][0] |= {"path": "../secret", "size_bytes": 1}
    (model.folder / "source.json").write_text(json.dumps(manifest))
    assert list_models() == []
