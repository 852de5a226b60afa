"""`python -m bench` runs what is a benchmark, nothing else, and each of them within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.__main__ import benchmarks, main, run_quickly

MAIN = '\n\nif __name__ == "__main__":\n    '


def test_benchmarks_are_told_from_what_they_share() -> None:
    found = benchmarks()
    assert {"engine", "speculation", "train"} <= found.keys()
    assert not {"rows", "random_model", "prompts", "__main__"} & found.keys()


def test_every_benchmark_knows_the_quick_form() -> None:
    for path in benchmarks().values():
        text = path.read_text(encoding="utf-8")
        assert '"--quick"' in text or "rows import" in text or "rows.arguments(" in text, path.name


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("import sys\n    assert sys.argv[1:] == ['--quick']", ""),
        ("raise SystemExit(3)", "ended with code 3"),
        ("import time\n    time.sleep(60)", "stopped after 1 s"),
    ],
)
def test_how_a_run_ends_is_told(tmp_path: Path, body: str, expected: str) -> None:
    path = tmp_path / "some.py"
    path.write_text(MAIN + body + "\n")
    limit = 1.0 if "sleep" in body else 60.0
    assert run_quickly(path, limit) == expected


def test_names_are_checked_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [*benchmarks()]
    with pytest.raises(SystemExit):
        main(["rows"])
    assert "there is no benchmark rows" in capsys.readouterr().err
