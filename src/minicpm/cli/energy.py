"""Joules that the processor packages used, where the system counts them and lets this user read the counters (RAPL)."""

from __future__ import annotations

from pathlib import Path

COUNTERS = Path("/sys/class/powercap")


class EnergyMeter:
    """Reads the package counters below `folder`; whole processors, other programs' share included."""

    def __init__(self, folder: Path = COUNTERS) -> None:
        # One name per package; names with a second colon are parts of one.
        packages = sorted(p for p in folder.glob("intel-rapl:*") if p.name.count(":") == 1)
        self._packages = [p for p in packages if _number(p / "energy_uj") is not None]
        self._last = self._read()

    @property
    def is_available(self) -> bool:
        """Whether there is any counter to read."""
        return bool(self._packages)

    def start(self) -> None:
        """Begin to count."""
        self._last = self._read()

    def joules(self) -> float | None:
        """Return what was used since `start`, None without counters; good for spans shorter than a counter's turn."""
        if not self._packages:
            return None
        total = 0
        for package, before, after in zip(self._packages, self._last, self._read(), strict=True):
            # Counters start again at zero: within minutes under load.
            wrap = (_number(package / "max_energy_range_uj") or 0) + 1
            total += after - before if after >= before else after + wrap - before
        return total / 1e6

    def _read(self) -> list[int]:
        return [_number(package / "energy_uj") or 0 for package in self._packages]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
