"""The kernels of 64-bit ARM, cross-compiled and run under qemu: as true as the others, each chosen where it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.e2e.native_build import BUILD_SECONDS, ROOT, build, check_passed, run

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(BUILD_SECONDS)]


@pytest.fixture(scope="module")
def folder() -> Path:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed; on Debian: apt install g++-aarch64-linux-gnu")
    return build("aarch64", f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'native/tests/aarch64.cmake'}")


@pytest.fixture(scope="module")
def emulator() -> str:
    found = next(filter(None, map(shutil.which, EMULATORS)), None)
    return found or pytest.skip("qemu-aarch64 is not installed; on Debian: apt install qemu-user")


def test_no_file_or_flag_is_of_another_processor(folder: Path) -> None:
    commands = json.loads((folder / "compile_commands.json").read_text(encoding="utf-8"))
    kernels = {Path(c["file"]).name for c in commands if Path(c["file"]).parent.name == "kernels"}
    assert kernels == {"select.cpp", "portable.cpp", "neon.cpp", "i8mm.cpp"}
    # What an instruction set needs stays in its own file: all others must start on every processor.
    with_flags = {Path(c["file"]).name for c in commands if "-march" in c["command"] or "-mavx" in c["command"]}
    assert with_flags == {"neon.cpp", "i8mm.cpp"}


def test_with_matrix_products(folder: Path, emulator: str) -> None:
    done = run(folder, "--quick", under=(emulator, "-cpu", "max"))
    check_passed(done, ["neon-i8mm", "neon-dotprod", "portable"], at_least=31)


def test_with_dot_products_only(folder: Path, emulator: str) -> None:
    done = run(folder, "--quick", "products", "attention", "stored", "decoder", under=(emulator, "-cpu", "neoverse-n1"))
    check_passed(done, ["neon-dotprod", "portable"], at_least=15)


def test_with_neither(folder: Path, emulator: str) -> None:
    done = run(folder, "--quick", "products", "decoder_gives", "pool", under=(emulator, "-cpu", "cortex-a72"))
    check_passed(done, ["portable"], at_least=12)
