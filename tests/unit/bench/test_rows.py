"""The harness of the benchmarks: which way a ratio points, what the JSON holds, and that a busy machine is noticed."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench import rows
from bench.rows import CALM_SHARE, ForeignLoad, Row, Samples, as_table, compare, finish, take_turns


def test_more_is_better_in_every_ratio() -> None:
    faster = compare("decode", 30.0, 20.0, "peer", "tokens/s", 1.2)
    smaller = compare("memory", 2.0, 3.0, "bound", "GiB", 1.0, less_is_better=True)
    assert faster.ratio == smaller.ratio == 1.5
    assert compare("decode", 20.0, 30.0, "peer", "tokens/s", 1.0).verdict == "FALLS SHORT"
    assert compare("memory", 3.0, 2.0, "bound", "GiB", 1.0, less_is_better=True).verdict == "FALLS SHORT"
    assert (faster.verdict, smaller.verdict, compare("x", 1.0, 2.0, "peer", "s").verdict) == ("holds", "holds", "")


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_what_was_not_measured_is_no_row(bad: float) -> None:
    for pair in ((bad, 1.0), (1.0, bad)):
        with pytest.raises(ValueError, match="positive"):
            compare("decode", *pair, "peer", "tokens/s")


def test_contenders_take_turns_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_PAUSE_SECONDS", 0)
    monkeypatch.setattr(rows, "wait_for_calm", lambda: True)
    monkeypatch.setattr(rows, "CALM_SHARE", 1.0)
    calls = []
    answers = {"ours": iter([9.0, 1.0, 2.0]), "peer": iter([4.0, 5.0, 60.0])}

    def run(name: str) -> float:
        calls.append(name)
        return next(answers[name])

    samples = take_turns({"ours": lambda: run("ours"), "peer": lambda: run("peer")}, rounds=3)
    assert calls == ["ours", "peer"] * 3
    assert (samples.median("ours"), samples.median("peer")) == (2.0, 5.0)
    assert not samples.disturbed


def test_a_machine_that_changes_its_pace_is_told() -> None:
    lines = Samples({"ours": [20.0, 22.0, 21.0], "limit": [58.0, 37.0, 58.0]}).unsteady()
    assert lines == ["limit went from 37 to 58 between rounds"]


def test_a_disturbed_run_is_repeated_once_and_then_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_PAUSE_SECONDS", 0)
    monkeypatch.setattr(rows, "wait_for_calm", lambda: True)
    shares = iter([1.0, 0.0, 1.0, 1.0])
    monkeypatch.setattr(ForeignLoad, "share", lambda self: next(shares))
    counts = [0]

    def run() -> float:
        counts[0] += 1
        return float(counts[0])

    assert take_turns({"ours": run}, rounds=2) == Samples({"ours": [3.0, 4.0]}, disturbed=False)
    assert take_turns({"ours": run}, rounds=1) == Samples({"ours": [6.0]}, disturbed=True)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the load is read from /proc/stat")
def test_the_work_of_another_process_is_seen_and_our_own_is_not() -> None:
    # Started through a process that ends at once, so that the worker is no child of ours.
    start = "import os,sys,time\nif os.fork(): os._exit(0)\nend=time.time()+0.8\nwhile time.time()<end: pass"
    load = ForeignLoad()
    subprocess.run([sys.executable, "-S", "-c", start], check=True)
    time.sleep(1.0)
    seen = load.share()
    assert seen > max(CALM_SHARE, 0.3 / (os.cpu_count() or 1))
    ours = ForeignLoad()
    before, end = os.times().user, time.perf_counter() + 0.5
    while time.perf_counter() < end:
        pass
    used = os.times().user - before
    # Whatever else runs on this machine meanwhile, our own seconds must not be among the foreign ones.
    total = (rows._busy_seconds() - ours._busy) / (0.5 * (os.cpu_count() or 1))
    assert ours.share() <= total - used / (0.5 * (os.cpu_count() or 1)) + 0.1


def test_rows_are_written_with_the_fields_that_readers_expect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    measured = [
        compare("decode-2b", 20.0, 25.0, "read bandwidth", "GB/s", 0.72),
        compare("kl-135m", 6e-7, 5e-4, "bound", "nats", None, less_is_better=True, disturbed=True),
    ]
    finish(measured, argparse.Namespace(json=path))
    found = json.loads(path.read_text())
    assert [*found[0]] == ["name", "ours", "peer", "peer_name", "unit", "ratio", "must", "disturbed"]
    assert [Row(**row) for row in found] == measured
    text = capsys.readouterr().out
    assert text.strip() == as_table(measured)
    assert "0.80" in text
    assert "disturbed" in text.splitlines()[2]
    assert not [line for line in text.splitlines() if line != line.rstrip()]
