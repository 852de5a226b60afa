"""The native part under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer: no finding."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.e2e.native_build import BUILD_SECONDS, build, check_passed, run

from minicpm import _native

# What each fault of native/tests/faults.cpp is called by the sanitizers that see it.
FAULTS = {
    "address,undefined": {
        "heap": "heap-buffer-overflow",
        "mapping": "use-after-poison",
        "overflow": "signed integer overflow",
    },
    "thread": {"race": "data race"},
}

pytestmark = [
    pytest.mark.slow,
    # Compiling takes most of it: about 40 s each on two free cores.
    pytest.mark.timeout(BUILD_SECONDS),
    pytest.mark.skipif(platform.system() != "Linux", reason="sanitizers are set up for Linux"),
]


def fixed_addresses() -> tuple[str, ...]:
    """ThreadSanitizer finds its shadow memory taken where addresses are randomized widely."""
    setarch = shutil.which("setarch")
    if setarch is None:
        return ()
    command = (setarch, platform.machine(), "--addr-no-randomize")
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else ()


@pytest.fixture(scope="module", params=FAULTS)
def sanitizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(sanitizer: str) -> Path:
    return build(sanitizer.replace(",", "-"), f"-DMINICPM_SANITIZE={sanitizer}")


def test_nothing_is_found(folder: Path) -> None:
    done = run(folder, under=fixed_addresses())
    check_passed(done, _native.features()["kernels"], at_least=30)
    # Findings that do not end a run, such as a leak's, are on the standard error.
    assert done.stderr == ""


def test_faults_are_found(folder: Path, sanitizer: str) -> None:
    for fault, name in FAULTS[sanitizer].items():
        done = run(folder, "--fault", fault, under=fixed_addresses())
        assert done.returncode != 0, f"{fault} went unnoticed"
        assert name in done.stderr
