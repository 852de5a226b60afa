"""What `minicpm bench` reads from others: a llama-bench's answers, and the energy counters of the system."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minicpm.cli.energy import EnergyMeter
from minicpm.cli.llama_bench import LlamaBench, PeerError

# What the real one writes, shortened to the fields around the one that is read; it answers with its arguments.
ANSWER = """[{"build_commit": "0c1e570", "n_prompt": 32, "n_gen": 0, "avg_ns": 352201159, "avg_ts": 90.857168,
"samples_ts": [ 90.8572 ]}]"""


def program(folder: Path, body: str, name: str = "llama-bench") -> Path:
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$@" > {folder}/{name}.arguments\n{body}\n')
    path.chmod(0o755)
    return path


def arguments(folder: Path, name: str = "llama-bench") -> list[str]:
    return (folder / f"{name}.arguments").read_text().split()


def test_its_answer_and_what_it_is_asked(tmp_path: Path) -> None:
    bench = LlamaBench(str(program(tmp_path, f"cat <<'E'\n{ANSWER}\nE")), tmp_path / "m.gguf", 2)
    assert bench.prefill(32) == 90.857168
    assert arguments(tmp_path)[-4:] == ["-p", "32", "-n", "0"]
    assert bench.decode(8, context=1024) == 90.857168
    words = arguments(tmp_path)
    assert words[-6:] == ["-p", "0", "-n", "8", "-d", "1024"]
    assert words[words.index("-m") + 1] == str(tmp_path / "m.gguf")
    assert words[words.index("-t") + 1] == "2"


def test_batches_have_a_program_beside_it(tmp_path: Path) -> None:
    bench = LlamaBench(str(program(tmp_path, "")), tmp_path / "m.gguf", 2)
    assert not bench.can_batch
    line = json.dumps({"pp": 1, "tg": 16, "pl": 4, "t_tg": 2.87, "speed_tg": 22.34, "speed": 23.67})
    program(tmp_path, f"echo; echo '{line}'", "llama-batched-bench")
    assert bench.can_batch
    assert bench.decode_batch(16, 4) == 22.34
    words = arguments(tmp_path, "llama-batched-bench")
    assert words[words.index("-npl") + 1] == "4"
    assert int(words[words.index("-c") + 1]) >= 4 * 17


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("echo broken file >&2; exit 3", "ended with 3: broken file"),
        ("echo hello", "wrote no avg_ts"),
        ("echo '[]'", "wrote no avg_ts"),
        ("echo '[{\"avg_ts\": 0}]'", "wrote no avg_ts"),
    ],
)
def test_a_program_that_measures_nothing(tmp_path: Path, body: str, answer: str) -> None:
    with pytest.raises(PeerError, match=answer):
        LlamaBench(str(program(tmp_path, body)), tmp_path / "m.gguf", 1).prefill(8)


def test_no_program_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PeerError, match="is no program"):
        LlamaBench("llama.cpp", tmp_path / "m.gguf", 1)
    found = program(tmp_path, "")
    assert LlamaBench("llama.cpp", tmp_path / "m.gguf", 1).program == found


def counter(folder: Path, microjoules: int, limit: int = 1_000_000) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit - 1}\n")


def test_energy_of_two_packages_one_of_which_starts_again(tmp_path: Path) -> None:
    counter(tmp_path / "intel-rapl:0", 100_000)
    counter(tmp_path / "intel-rapl:1", 900_000)
    counter(tmp_path / "intel-rapl:0:0", 50_000)
    meter = EnergyMeter(tmp_path)
    meter.start()
    counter(tmp_path / "intel-rapl:0", 600_000)
    counter(tmp_path / "intel-rapl:1", 150_000)
    counter(tmp_path / "intel-rapl:0:0", 999_000)
    assert meter.is_available
    assert meter.joules() == pytest.approx(0.5 + 0.25)


def test_no_counters_are_no_zero(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path)
    assert not meter.is_available
    assert meter.joules() is None
