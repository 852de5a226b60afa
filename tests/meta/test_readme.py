"""The commands of the READMEs: every `$ minicpm …` of a console block is one that our parsers accept.

A block under the line `<!-- runnable -->` is run too, in order, in an empty folder; what it needs must be in it.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minicpm.cli.main import VERBS
from minicpm.cli.parser import Parser

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(<!-- runnable -->\s*\n)?^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROMPT = "$ minicpm "


def commands(block: str) -> list[list[str]]:
    """The words of each `$ minicpm …` line of a block, up to the first pipe or redirection."""
    lines = block.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if line.startswith(_PROMPT):
            words = shlex.split(line.removeprefix(_PROMPT), comments=True)
            end = next((i for i, word in enumerate(words) if word in {"|", ">", "<", "&&", ";", "&", "2>"}), len(words))
            found.append(words[:end])
    return found


def blocks() -> list[tuple[str, bool, list[list[str]]]]:
    """(file, is runnable, commands) of every console block with commands of ours."""
    found = []
    for path in [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]:
        for match in _BLOCK.finditer(path.read_text(encoding="utf-8")):
            if words := commands(match[2]):
                found.append((str(path.relative_to(ROOT)), match[1] is not None, words))
    return found


@pytest.mark.parametrize(
    ("file", "words"), [(file, words) for file, _, lines in blocks() for words in lines], ids=lambda x: str(x)[:80]
)
def test_every_command_parses(file: str, words: list[str]) -> None:
    verb, *rest = words
    if verb in {"--help", "--version"}:
        return
    assert verb in VERBS, f"{file}: unknown verb in `minicpm {shlex.join(words)}`"
    parser: Parser = importlib.import_module(f"minicpm.cli.{verb}").parser()
    if "--help" not in rest:
        parser.parse(rest)


@pytest.mark.parametrize(
    ("file", "lines"), [(file, lines) for file, runs, lines in blocks() if runs], ids=lambda x: str(x)[:80]
)
def test_runnable_blocks_run(file: str, lines: list[list[str]], smollm2_path: Path, tmp_path: Path) -> None:
    for words in lines:
        command = [sys.executable, "-m", "minicpm", *words]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=120, cwd=tmp_path, stdin=subprocess.DEVNULL
        )
        assert run.returncode == 0, f"{file}: `minicpm {shlex.join(words)}` ends with {run.returncode}: {run.stderr}"


def test_the_reader_of_blocks() -> None:
    text = '<!-- runnable -->\n```console\n$ minicpm chat smollm2 "it\'s" \\\n --greedy  # short\nanswer\n$ ls\n```\n'
    match = _BLOCK.search(text)
    assert match is not None
    assert match[1]
    assert commands(match[2]) == [["chat", "smollm2", "it's", "--greedy"]]
    assert commands("$ minicpm show x --json | jq .") == [["show", "x", "--json"]]
