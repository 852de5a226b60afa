"""Every benchmark in its quick form, one after the other: `python -m bench`, or `make bench`.

A benchmark is a file of this folder that runs by itself; the other files are what benchmarks share. One that fails or
takes too long does not keep the others from running; the exit code then is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# A quick run takes about a minute; the first one also makes the random 2B model.
LIMIT_SECONDS = 300.0


def benchmarks(folder: Path = FOLDER) -> dict[str, Path]:
    """Return the name and file of every benchmark, sorted."""
    files = sorted(folder.glob("[!_]*.py"))
    return {path.stem: path for path in files if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")}


def run_quickly(path: Path, limit_seconds: float) -> str:
    """Run one benchmark and return how it ended, "" when it measured."""
    # A group of its own, so that nothing that it started outlives it.
    process = subprocess.Popen([sys.executable, str(path), "--quick"], start_new_session=True)
    try:
        code = process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"ended with code {code}" if code else ""


def main(arguments: Sequence[str] | None = None) -> int:
    known = benchmarks()
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"these only: {', '.join(known)}")
    parser.add_argument("--list", action="store_true", help="say what there is and run nothing")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="of each (%(default)s)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - known.keys())
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    if options.list:
        print("\n".join(known))
        return 0
    failures = 0
    for name in options.names or known:
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        problem = run_quickly(known[name], options.limit)
        failures += bool(problem)
        print(f"== {name}: {problem or 'done'}, {time.perf_counter() - begin:.0f} s\n", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
