"""Whether a program that a model wrote passes its tests, run in a process of its own that can do no harm (`jail.py`).

Source of what is run: openai/human-eval `execution.py` (prompt, completion, test, `check(entry_point)`); of MBPP the
list of assertions.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm.errors import EvalError
from minicpm.eval import jail

SECONDS = 5
MEGABYTES = 1024
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.S | re.I)


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed, and if not why: "passed", "failed: …", "took too long"."""

    has_passed: bool
    reason: str


def require_jail() -> None:
    """Do nothing where programs can be held.

    Raises:
        EvalError: this machine cannot, so that no program is run.
    """
    if not jail.supported():
        raise EvalError(
            "programs are run only where Linux can hold them (seccomp and Landlock); leave the code tasks out"
        )
    verdict = run_program("pass")
    if not verdict.has_passed:
        raise EvalError(f"this machine cannot hold programs: {verdict.reason}; leave the code tasks out")


def build_program(text: str, gold: dict[str, Any]) -> str:
    """Return the program to run: the answer in `text`, after what it continues, before its tests.

    A fenced block counts as the answer. If that (or the text) defines `entry_point` by itself, what it would continue
    is left away.

    Args:
        text: what the model wrote.
        gold: `prompt` (code that the text continues, or ""), `tests` (code), `entry_point` (a name, or "").
    """
    fenced = _FENCE.search(text)
    answer = fenced[1] if fenced else text
    entry = gold.get("entry_point", "")
    is_whole = bool(entry) and re.search(rf"^(?:async )?def {re.escape(entry)}\b", answer, re.M)
    front = gold.get("prompt", "")
    if is_whole:
        # Imports and helpers of the prompt still count.
        front = front[: front.rfind(f"def {entry}")] if f"def {entry}" in front else ""
    return f"{front}{answer}\n{gold['tests']}\n"


def run_program(program: str, *, seconds: int = SECONDS, megabytes: int = MEGABYTES) -> Verdict:
    """Run `program` in the jail and say whether it came to its end without an error.

    Args:
        program: Python.
        seconds: processor time, and a little more by the clock.
        megabytes: of address space.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="minicpm-code-") as folder:
        command = [sys.executable, "-I", str(Path(jail.__file__)), folder, str(seconds), str(megabytes)]
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=said, stderr=errors, env={}, start_new_session=True
            )
            try:
                process.communicate(f"{token}\n{program}".encode("utf-8", "replace"), timeout=2 * seconds)
            except subprocess.TimeoutExpired:
                return Verdict(False, "took too long")
            finally:
                process.kill()
                process.wait()
            said.seek(0)
            if said.read(len(token)) == token.encode() and process.returncode == 0:
                return Verdict(True, "passed")
            return Verdict(False, _explain(process.returncode, errors))


def _explain(code: int, errors: Any) -> str:
    size = errors.seek(0, 2)
    errors.seek(max(0, size - 2000))
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    if code == -24 or code == -9:
        return "took too long"
    return f"failed: {lines[-1][:200]}" if lines else f"failed: ended early with code {code}"
