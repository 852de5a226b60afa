"""The history: every checkpoint of a run, coded from the one before, provably right, readable by the byte range.

What this leaves out: training (`train`), which writes into it, and whatever studies it.
"""

from __future__ import annotations

from minicpm.history.catalogue import About, Row
from minicpm.history.manifest import Facts
from minicpm.history.reading import History, Snapshot
from minicpm.history.store import HistoryWriter

__all__ = ["About", "Facts", "History", "HistoryWriter", "Row", "Snapshot"]
