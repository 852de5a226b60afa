"""Runs a `llama-bench` that the user has, and reads what it says: the peer of `minicpm bench --against`.

What this leaves out: getting or building it. Its own `llama-batched-bench` is used for batches where it stands beside.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from minicpm.errors import MiniCPMError

_NAME, _BATCHED_NAME = "llama-bench", "llama-batched-bench"
# A prompt of 1,024 tokens on a slow machine takes minutes; longer than this is a hang.
_LIMIT_SECONDS = 1800


class PeerError(MiniCPMError):
    """The other program cannot be run, or does not say what it measured."""


class LlamaBench:
    """One `llama-bench` on one file with `num_threads` threads; every figure is tokens per second.

    Flash attention is off, with which it is fastest on CPUs, and the cache is f16, as ours.

    Args:
        program: its path, or "llama.cpp" for the one on the PATH.
        model: a GGUF file.
        num_threads: threads.

    Raises:
        PeerError: there is no such program.
    """

    def __init__(self, program: str, model: Path, num_threads: int) -> None:
        named = _NAME if program == "llama.cpp" else program
        found = shutil.which(named)
        if found is None:
            raise PeerError(f"{program!r} is no program; give the path of {_NAME}, or put it on the PATH")
        self.program, self.model, self.num_threads = Path(found).resolve(), model, num_threads

    def prefill(self, num_tokens: int) -> float:
        """Tokens per second of a prompt."""
        return self._run("-p", str(num_tokens), "-n", "0")

    def decode(self, num_tokens: int, context: int = 0) -> float:
        """Tokens per second of one sequence after `context` positions."""
        return self._run("-p", "0", "-n", str(num_tokens), "-d", str(context))

    @property
    def can_batch(self) -> bool:
        """Whether `decode_batch` has its program."""
        return self._batched.is_file()

    def decode_batch(self, num_tokens: int, batch: int) -> float:
        """Tokens per second of `batch` sequences together, each after a prompt of one token."""
        tokens = batch * (num_tokens + 1)
        settings = ["-npp", "1", "-ntg", str(num_tokens), "-npl", str(batch), "-c", str(tokens + 64)]
        threads = ["-t", str(self.num_threads), "-tb", str(self.num_threads)]
        command = [self._batched, "-m", self.model, *settings, *threads, "-fa", "off", "--output-format", "jsonl"]
        lines = [line for line in _output(command).splitlines() if line.startswith("{")]
        return _figure(json.loads(lines[-1]) if lines else {}, "speed_tg", self._batched)

    def resident_bytes(self, num_tokens: int) -> int:
        """Return the largest resident memory of a prompt of `num_tokens`, mapped pages of the file included."""
        command = [*self._command("-p", str(num_tokens), "-n", "0"), "--no-warmup"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise PeerError(f"{self.program} ended with {process.returncode}")
        return usage.ru_maxrss * 1024

    @property
    def _batched(self) -> Path:
        return self.program.with_name(_BATCHED_NAME)

    def _command(self, *settings: str) -> list[str]:
        fixed = ["-m", str(self.model), "-t", str(self.num_threads), "-r", "1", "-fa", "0", "-o", "json"]
        return [str(self.program), *fixed, *settings]

    def _run(self, *settings: str) -> float:
        try:
            runs = json.loads(_output(self._command(*settings)))
        except ValueError:
            runs = []
        return _figure(runs[-1] if runs else {}, "avg_ts", self.program)


def _output(command: list[Any]) -> str:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_LIMIT_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except OSError as error:
        raise PeerError(f"{words[0]} cannot be run: {error.strerror}; give the path of {_NAME}") from error
    except subprocess.TimeoutExpired:
        raise PeerError(f"{words[0]} did not end within {_LIMIT_SECONDS} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PeerError(f"{words[0]} ended with {done.returncode}: {last[:200]}")
    return done.stdout


def _figure(run: Any, field: str, program: Path) -> float:
    value = run.get(field) if isinstance(run, dict) else None
    if not isinstance(value, int | float) or not value > 0:
        raise PeerError(f"{program} wrote no {field}; is it {_NAME} of a recent llama.cpp?")
    return float(value)
