import os
import stat
from collections import namedtuple
from pathlib import Path

import pytest

from minicpm.errors import CheckpointError
from minicpm.formats.atomic_file import atomic_file


def test_the_file_appears_whole_and_with_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"abc")
            assert not (tmp_path / "a").exists()
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_bytes() == b"abc"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail_half_way() -> None:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)):
        fail_half_way()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_missing_folder_and_a_full_disk_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*no/a: No such file"), atomic_file(tmp_path / "no/a"):
        pass
    status = namedtuple("status", "f_bavail f_frsize")(2, 500_000)
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    with (
        pytest.raises(CheckpointError, match=r"takes 2.0 MB, the disk has 1.0 MB"),
        atomic_file(tmp_path / "a", 2_000_000),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: real_open(Path("/dev/full"), "wb"))
    with pytest.raises(CheckpointError, match="No space left on device"), atomic_file(tmp_path / "a") as file:
        file.write(bytes(100_000))
    assert not list(tmp_path.iterdir())
