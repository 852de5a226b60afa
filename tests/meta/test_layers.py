"""The layering rule of docs/architecture.md, checked: a module may import only from layers below its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = "minicpm"
ROOT = Path(__file__).parents[2] / "src" / PACKAGE
# Lowest first. Folders on one line are peers and may not import each other.
LAYERS = [
    {"errors", "_native"},
    {"config"},
    {"architecture"},
    {"tokenizer", "formats", "hub"},
    {"engine", "model"},
    {"data", "history", "vision"},
    {"train"},
    {"eval"},
    {"quant", "rag"},
    {"lab", "exchange", "serve"},
    {"cli"},
    {"__main__"},
]
# Copied into exports, where transformers wants relative imports; nothing in the package imports them.
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent.name != "remote_code" or p.name == "__init__.py")
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported_units(path: Path) -> set[str]:
    """Top-level folders or files of the package that `path` imports, also in TYPE_CHECKING blocks and functions."""
    units = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            raise AssertionError(f"{path}:{node.lineno}: relative import; write {PACKAGE}.… in full")
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != PACKAGE else [f"{PACKAGE}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        units |= {n.split(".")[1] for n in names if n.startswith(PACKAGE + ".")}
    return units - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_lower_layers(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the package's public face may import from every layer
    unknown = {own, *imported_units(path)} - RANK.keys()
    assert not unknown, f"{path.name}: {sorted(unknown)} stand on no layer; add them to LAYERS"
    above = {u for u in imported_units(path) - {own} if RANK[u] >= RANK[own]}
    assert not above, f"{path.name} ({own}) may not import {sorted(above)}: same layer or above"
