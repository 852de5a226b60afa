"""Names, paths and the nearest of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from minicpm.errors import HubError
from minicpm.hub import cache_folder, list_models, remove, resolve


def test_the_cache_folder_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MINICPM_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache/minicpm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder() == tmp_path / ".cache/minicpm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/minicpm")
    monkeypatch.setenv("MINICPM_HOME", "~/models")
    assert cache_folder() == tmp_path / "models"


def test_a_path_that_exists(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"")
    assert resolve(str(file)) == file
    assert resolve(tmp_path) == tmp_path
    # A folder that happens to be called like the pinned model does not hide it.
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match="minicpm pull smollm2"):
        resolve("smollm2", allow_pull=False)
    assert resolve("./smollm2") == Path("smollm2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smolm2", "no model named 'smolm2'; nearest: smollm2; see `minicpm models`"),
        ("zzzz", "no model named 'zzzz'; known: smollm2; see"),
        ("What is this?", 'to ask the default model write: minicpm chat smollm2 "…"'),
        ("x" * 5000, "no model named"),
        ("", "no model named ''"),
        ("a\0b", "no model named"),
        ("hf:acme/tiny", "hf:acme/tiny is not here yet; run `minicpm pull hf:acme/tiny`"),
        ("hf:acme", "write hf:owner/name"),
        ("nowhere/tiny.gguf", "no file or folder nowhere/tiny.gguf (there is no folder nowhere)"),
    ],
)
def test_what_is_not_found(home: Path, text: str, message: str) -> None:
    with pytest.raises(HubError) as caught:
        resolve(text)
    assert message in str(caught.value)


def test_the_nearest_file(home: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.Q4_0.gguf").write_bytes(b"")
    with pytest.raises(HubError, match=r"nearest in .*: tiny.Q4_0.gguf"):
        resolve(str(tmp_path / "tiny.Q4_1.gguf"))


def test_an_empty_or_foreign_cache(home: Path) -> None:
    assert list_models() == []
    (home / "models" / "junk").mkdir(parents=True)
    (home / "models" / "junk" / "source.json").write_text('{"files": [{"path": 3}]}')
    (home / "models" / "list").mkdir(parents=True)
    (home / "models" / "list" / "source.json").write_text("[]")
    assert list_models() == []
    with pytest.raises(HubError, match="no model 'junk' in the cache"):
        remove("junk")


def test_looking_a_name_up_opens_no_connections(tmp_path: Path) -> None:
    """`chat` pays for a lookup at every start, so it must not import what only a fetch needs."""
    code = (
        "import sys; from minicpm.hub import resolve; resolve(sys.argv[1]);"
        "print({'urllib.request', 'ssl', 'zipfile', 'subprocess', 'numpy', 'rich'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
