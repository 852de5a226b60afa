"""`__all__` is true and lazy (ruff keeps it sorted)."""

import subprocess
import sys

import minicpm


def test_every_public_name_exists() -> None:
    for name in minicpm.__all__:
        assert getattr(minicpm, name) is not None


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, minicpm; print(sorted({'numpy', 'torch', 'typer', 'rich', 'tokenizers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
