"""minicpm: the whole life of small end-side language models in the MiniCPM architecture.

Public names are loaded when first used, so that `import minicpm` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpm.architecture import PRESETS, ModelConfig
    from minicpm.errors import MiniCPMError

__version__ = "0.1.0"

__all__ = ["PRESETS", "MiniCPMError", "ModelConfig", "__version__"]

_HOMES = {
    "PRESETS": "minicpm.architecture",
    "MiniCPMError": "minicpm.errors",
    "ModelConfig": "minicpm.architecture",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minicpm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
