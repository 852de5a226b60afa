"""Programs that want to do harm, to run for ever, or to pass without passing."""

from __future__ import annotations

from pathlib import Path

import pytest

from minicpm.eval import jail
from minicpm.eval.code import build_program, require_jail, run_program

pytestmark = pytest.mark.skipif(not jail.supported(), reason="needs Linux on x86-64 or arm64")


def test_a_program_that_passes() -> None:
    require_jail()
    assert run_program("import math, threading\nt = threading.Thread(target=print)\nt.start()\nt.join()").has_passed


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import socket\nsocket.socket()",
        "import os\nos.kill(os.getppid(), 9)",
        "x = [0] * 10**10",
        "def f(): f()\nf()",
        "this is no program",
        "",
    ],
)
def test_programs_that_do_not_pass(program: str) -> None:
    verdict = run_program(program or "1 / 0")
    assert not verdict.has_passed
    assert verdict.reason.startswith("failed: ")


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(1000)"])
def test_programs_that_do_not_end(program: str) -> None:
    assert run_program(program, seconds=1).reason == "took too long"


def test_a_program_writes_into_its_own_folder_alone(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    assert run_program("open('own', 'w').write('x')").has_passed
    for program in (f"open({str(victim)!r}, 'w')", f"import os\nos.unlink({str(victim)!r})"):
        assert "Permission" in run_program(program).reason
    assert victim.read_text() == "mine"


def test_a_program_that_talks_without_end_is_held() -> None:
    # What it prints goes nowhere; a message of an error is cut.
    assert run_program("print('x' * 10**7)").has_passed
    assert len(run_program("raise ValueError('x' * 10**6)").reason) < 300


GOLD = {
    "prompt": "import math\n\ndef twice(x):\n",
    "entry_point": "twice",
    "tests": "assert twice(math.floor(2.5)) == 4",
}


@pytest.mark.parametrize(
    "text",
    [
        "    return 2 * x\n",
        "Sure:\n```python\ndef twice(x):\n    return 2 * x\n```\nIt doubles.",
        "```\n    return 2 * x\n```",
        "def twice(x):\n    return 2 * x",
    ],
)
def test_answers_in_every_shape(text: str) -> None:
    assert run_program(build_program(text, GOLD)).has_passed


def test_a_wrong_answer_fails() -> None:
    assert run_program(build_program("    return x\n", GOLD)).reason == "failed: AssertionError"
