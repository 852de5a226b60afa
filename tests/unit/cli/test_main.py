"""The dispatcher: one verb is imported, an error is one line, and nothing heavy comes along."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import minicpm
from minicpm.cli import main as entry
from minicpm.errors import FormatError


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["cht"], "error: unknown verb 'cht'; did you mean chat?"),
        (["zzz"], "error: unknown verb 'zzz'; there are chat, "),
        (["--verson"], "error: unknown option '--verson'; "),
        (["models", "--jsn"], "error: unknown option --jsn; did you mean --json?; see `minicpm models --help`"),
        (["show"], "error: the following arguments are required: MODEL; see `minicpm show --help`"),
        (["show", "a", "b"], "error: too many arguments: 'b'; put text with spaces in quotes"),
        (["models", "--remove"], "error: argument --remove: expected one argument"),
    ],
)
def test_a_wrong_command_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert entry.run(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"  {verb} " in text for verb in entry.VERBS)
    assert entry.run(["--version"]) == 0
    assert capsys.readouterr().out == f"minicpm {minicpm.__version__}\n"


@pytest.mark.parametrize("verb", entry.VERBS)
def test_every_verb_has_a_parser_with_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        entry.run([verb, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: minicpm {verb}")


def test_every_verb_file_is_listed() -> None:
    folder = Path(entry.__file__).parent
    verbs = {path.stem for path in folder.glob("*.py") if "\ndef run(options" in path.read_text(encoding="utf-8")}
    assert verbs == set(entry.VERBS)


class FakeVerb:
    """A verb that ends with `error`."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def parser(self) -> FakeVerb:
        return self

    def parse(self, arguments: list[str]) -> None:
        return None

    def run(self, options: object) -> None:
        raise self.error


def test_how_a_verb_may_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def end_with(error: BaseException) -> int:
        monkeypatch.setattr(importlib, "import_module", lambda name: FakeVerb(error))
        return entry.run(["chat"])

    assert end_with(FormatError("a file\nwith a line break\n in its name")) == 2
    assert capsys.readouterr().err == "error: a file with a line break in its name\n"
    assert end_with(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):
        end_with(ZeroDivisionError())


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys, minicpm.cli.main as m; m._HELP = 'x' * (1 << 20) + '{verbs}';"
        "sys.argv = ['minicpm', '--help']; m.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PATH": ""}
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=30) == 141


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import minicpm.cli.main as m; m.run(['--help'])", set()),
        ("import minicpm.cli.main as m; m.run(['chat', '--hlp'])", set()),
        ("import minicpm.cli.main as m; m.run(['models'])", set()),
    ],
)
def test_what_is_not_needed_is_not_imported(code: str, allowed: set[str], tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "numpy", "tokenizers", "jinja2", "rich", "typer", "urllib.request", "safetensors"}
    code += f"; import sys; print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    environment = {"MINICPM_HOME": str(tmp_path), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stderr.splitlines()[-1] == str(sorted(allowed))
