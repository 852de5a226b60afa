"""What every benchmark shares: contenders that take turns, medians, a look at the machine's load, the table, the JSON.

A benchmark adds its options to `arguments()`, measures with `take_turns`, makes `Row`s and ends with `finish`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A run during which others held more than this share of the machine is repeated, then reported as disturbed.
CALM_SHARE = 0.06
# Rounds further apart than this are told: medians of contenders may then come from different moments.
UNSTEADY_FACTOR = 1.25
# Threads of the contender before may still spin for a moment.
_PAUSE_SECONDS = 0.25


@dataclass(frozen=True)
class Row:
    """One comparison; `ratio` is oriented so that more is better, and `must` is what it has to reach, if anything."""

    name: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    ratio: float
    must: float | None
    disturbed: bool = False

    @property
    def verdict(self) -> str:
        """What the table says about `must`."""
        if self.must is None:
            return ""
        return "holds" if self.ratio >= self.must else "FALLS SHORT"


@dataclass(frozen=True)
class Samples:
    """What each contender reached in every round."""

    values: Mapping[str, list[float]]
    disturbed: bool = False

    def median(self, name: str) -> float:
        """The median of a contender's rounds."""
        return statistics.median(self.values[name])

    def unsteady(self) -> list[str]:
        """Lines about contenders whose rounds lie far apart: such a machine changed its pace during the run."""
        spans = {name: (min(values), max(values)) for name, values in self.values.items() if values}
        return [
            f"{name} went from {_figure(low)} to {_figure(high)} between rounds"
            for name, (low, high) in spans.items()
            if high > UNSTEADY_FACTOR * low
        ]


def compare(
    name: str,
    ours: float,
    peer: float,
    peer_name: str,
    unit: str,
    must: float | None = None,
    *,
    less_is_better: bool = False,
    disturbed: bool = False,
) -> Row:
    """Return the row of two figures in the same unit.

    Raises:
        ValueError: a figure that is no positive number: nothing was measured.
    """
    if not (0 < ours < float("inf") and 0 < peer < float("inf")):
        raise ValueError(f"{name}: measured {ours} against {peer} {unit}; both must be positive numbers")
    ratio = peer / ours if less_is_better else ours / peer
    return Row(name, ours, peer, peer_name, unit, ratio, must, disturbed)


def take_turns(
    contenders: Mapping[str, Callable[[], float]], rounds: int, attempts: int = 2, own: Sequence[int] = ()
) -> Samples:
    """Run every contender once a round, A B A B …; a disturbed run is repeated, at most `attempts` runs in all.

    `own` are ids of processes that are measured and run all the time: what they use does not disturb.
    """
    samples = Samples({})
    for _ in range(attempts):
        values: dict[str, list[float]] = {name: [] for name in contenders}
        wait_for_calm()
        load = ForeignLoad(own)
        for _ in range(rounds):
            for name, run in contenders.items():
                time.sleep(_PAUSE_SECONDS)
                values[name].append(run())
        share = load.share()
        samples = Samples(values, disturbed=share > CALM_SHARE)
        if not samples.disturbed:
            break
        print(f"others held {share:.0%} of the processors during {', '.join(contenders)}")
    for line in samples.unsteady():
        print(line)
    return samples


class ForeignLoad:
    """Measures what share of the machine's processors others have used since this was made; 0 where none can tell.

    Processes that this one started count as its own once they ended and were waited for, those in `own` at once.
    """

    def __init__(self, own: Sequence[int] = ()) -> None:
        self._processes = own
        self._start = time.perf_counter()
        self._busy = _busy_seconds()
        self._own = _own_seconds(own)

    def share(self) -> float:
        """Return the share, 0 to 1."""
        seconds = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
        foreign = (_busy_seconds() - self._busy) - (_own_seconds(self._processes) - self._own)
        return min(1.0, max(0.0, foreign / seconds)) if seconds > 0 else 0.0


def wait_for_calm(limit_seconds: float = 10.0, look_seconds: float = 0.5) -> bool:
    """Wait until others leave the machine alone; return whether they did within `limit_seconds`."""
    deadline = time.perf_counter() + limit_seconds
    while True:
        load = ForeignLoad()
        time.sleep(look_seconds)
        if load.share() <= CALM_SHARE:
            return True
        if time.perf_counter() >= deadline:
            return False


def _busy_seconds() -> float:
    """Seconds of all processors that were neither idle nor waiting, stolen ones included, since the machine started."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds(processes: Sequence[int]) -> float:
    times = os.times()
    return sum(times[:4]) + sum(map(_process_seconds, processes))


def _process_seconds(process: int) -> float:
    """Seconds that a running process has used, 0 where none can tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short rounds, within a minute")
    parser.add_argument("--rounds", type=int, help="how often everything takes its turn (default: 5; 2 with --quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    return parser


def rounds_of(options: argparse.Namespace) -> int:
    """Return the number of rounds that the options ask for."""
    return max(1, options.rounds or (2 if options.quick else 5))


def as_table(rows: Sequence[Row]) -> str:
    """Return the rows as a person reads them."""
    header = ("name", "ours", "peer", "peer's name", "unit", "ratio", "must", "")
    lines = [header]
    for row in rows:
        must = "" if row.must is None else f"{row.must:g}"
        remark = row.verdict + (" (disturbed)" if row.disturbed else "")
        lines.append((row.name, _figure(row.ours), _figure(row.peer), row.peer_name, row.unit))
        lines[-1] += (f"{row.ratio:.2f}", must, remark)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = {1, 2, 5, 6}
    return "\n".join(
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        .rstrip()
        for line in lines
    )  # fmt: skip


def finish(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Print the table and write the JSON; whoever gets here has measured, so the exit code is 0."""
    print(as_table(rows))
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


def _figure(value: float) -> str:
    return f"{value:.1e}" if value < 1e-2 else f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"
