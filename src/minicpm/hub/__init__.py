"""Names -> files: the cache folder, pinned sources, downloads with resume and hash.

`resolve` is what everyone else needs. Leaves out: opening the files (formats) and running them (engine).
"""

from __future__ import annotations

from minicpm.hub.cache import CachedModel, cache_folder, list_models, remove
from minicpm.hub.lookup import DEFAULT_MODEL, pull, resolve
from minicpm.hub.pinned import PINNED
from minicpm.hub.progress import Report, TerminalReport

__all__ = [
    "DEFAULT_MODEL",
    "PINNED",
    "CachedModel",
    "Report",
    "TerminalReport",
    "cache_folder",
    "list_models",
    "pull",
    "remove",
    "resolve",
]
