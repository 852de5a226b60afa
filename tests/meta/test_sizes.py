"""The size rule of docs/architecture.md: a file that grows past its limit holds two ideas."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON_FILES = sorted((ROOT / "src").rglob("*.py"))
NATIVE_FILES = sorted(p for p in (ROOT / "native").rglob("*") if p.suffix in {".cpp", ".h"})
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "manager", "handler", "util", "helper"}


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300, "a Python file stays under 300 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            docstring = ast.get_docstring(node, clean=False)
            length -= docstring.count("\n") + 1 if docstring else 0
            assert length <= 50, f"{path.name}:{node.lineno} {node.name} has {length} lines; the limit is 50"


@pytest.mark.parametrize("path", NATIVE_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_native_files_stay_small(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= 500, "a C++ file stays under 500 lines"


@pytest.mark.parametrize("path", PYTHON_FILES + NATIVE_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_are_named_after_what_they_hold(path: Path) -> None:
    assert path.stem.lower() not in FORBIDDEN_NAMES
