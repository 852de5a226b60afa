"""The history: every checkpoint of a run, coded from the one before, provably right, readable by the byte range.

What this leaves out: training (`train`), which writes into it, and whatever studies it. Names are loaded when first
used: every command looks at `naming`, and few open a history.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpm.history.catalogue import About, Row
    from minicpm.history.manifest import Facts
    from minicpm.history.naming import resolve
    from minicpm.history.reading import History, Snapshot
    from minicpm.history.store import HistoryWriter

__all__ = ["About", "Facts", "History", "HistoryWriter", "Row", "Snapshot", "resolve"]

_HOMES = {
    "About": "catalogue",
    "Facts": "manifest",
    "History": "reading",
    "HistoryWriter": "store",
    "Row": "catalogue",
    "Snapshot": "reading",
    "resolve": "naming",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minicpm.history' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minicpm.history.{_HOMES[name]}"), name)
