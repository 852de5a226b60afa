"""Text that every installation has: the sources of Python's standard library, and what they say about themselves.

`stdlib:sources` is code, `stdlib:docs` its documentation strings and the language reference that `help()` shows, in
English. Files are parsed, never run. What this leaves out: tests of the standard library and installed packages.
"""

from __future__ import annotations

import ast
import functools
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "_bundled"}
_TOPICS = Path("pydoc_data") / "topics.py"
_MIN_CHARACTERS = 64


@functools.cache
def stdlib_files() -> tuple[Path, ...]:
    """Return the source files of the running interpreter's standard library, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in root.rglob("*.py") if not _LEFT_OUT.intersection(file.relative_to(root).parts[:-1]))
    return tuple(sorted(file for file in files if not file.name.startswith(("test_", "_sysconfigdata"))))


def read_sources() -> Iterator[tuple[str, str]]:
    """Yield (text, where) of every source file but the one that holds the reference as a long string."""
    for file in stdlib_files():
        if file.parts[-2:] != _TOPICS.parts:
            text = _read(file)
            if len(text) >= _MIN_CHARACTERS:
                yield text, f"{file}:1"


def read_documentation() -> Iterator[tuple[str, str]]:
    """Yield (text, where) of the topics of the reference, and of each module's documentation strings."""
    for file in stdlib_files():
        is_topics = file.parts[-2:] == _TOPICS.parts
        try:
            tree = ast.parse(_read(file))
        except (SyntaxError, ValueError):
            continue
        for text, line in _topics(tree) if is_topics else _documentation(tree, file.stem):
            if len(text) >= _MIN_CHARACTERS:
                yield text, f"{file}:{line}"


def _topics(tree: ast.Module) -> Iterator[tuple[str, int]]:
    # topics = {'name': 'text', …}
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.strip(), value.lineno


def _documentation(tree: ast.Module, name: str) -> Iterator[tuple[str, int]]:
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                parts.append(f"{name if isinstance(node, ast.Module) else node.name}\n\n{text}")
    yield "\n\n".join(parts), 1


def _read(file: Path) -> str:
    try:
        with tokenize.open(file) as source:
            return source.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
