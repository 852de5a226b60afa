"""`minicpm bench` on a tiny random model: every figure is there and fits the others, and wrong wishes are one line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.formats.model_files import random_entries, vocabulary

from minicpm.architecture import ModelConfig
from minicpm.formats.gguf_write import write_gguf_model

Command = Callable[..., "subprocess.CompletedProcess[str]"]
SHORT = ("--rounds", "1", "--tokens", "4", "--threads", "1")


@pytest.fixture
def model(tiny_config: ModelConfig, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf_model(path, tiny_config, random_entries(tiny_config, "Q4_0"), vocabulary(tiny_config.vocab_size))
    return path


def test_figures_of_a_tiny_model(minicpm: Command, model: Path, tiny_config: ModelConfig) -> None:
    settings = ("--prompts", "20", "--contexts", "0,40", "--batches", "1,3", "--json")
    run = minicpm("bench", str(model), *settings, *SHORT)
    assert (run.returncode, run.stderr) == (0, "")
    facts = json.loads(run.stdout)
    assert (facts["path"], facts["threads"]) == (str(model), 1)
    works = [(s["phase"], s["num_tokens"], s["context"], s["batch"]) for s in facts["speeds"]]
    assert works == [("prefill", 20, 0, 1), ("decode", 4, 0, 1), ("decode", 4, 40, 1), ("decode", 4, 0, 3)]
    stored = facts["memory"]["file_weight_bytes"]
    linear, head = tiny_config.num_parameters().linear, tiny_config.vocab_size * tiny_config.hidden_size
    # Middle of the four steps, keys and values in two bytes each.
    positions, value_bytes = {0: 2, 40: 42}, 2 * 2 * tiny_config.num_hidden_layers * tiny_config.kv_size
    for speed in facts["speeds"]:
        rate = speed["tokens_per_second"]
        if speed["phase"] == "prefill":
            expected = (stored / 20, 2 * linear)
        else:
            cached = positions[speed["context"]] * value_bytes
            expected = (stored / speed["batch"] + cached, 2 * (linear + head))
        assert speed["bytes_per_second"] / rate == pytest.approx(expected[0])
        assert speed["operations_per_second"] / rate == pytest.approx(expected[1])
        machine = facts["machine"]
        product = machine["float32_product_operations_per_second"]
        assert speed["bandwidth_share"] > 0
        assert speed["product_share"] > 0
        assert machine["read_bytes_per_second"] > 1e8
        assert product > 1e8
        assert speed["peer_tokens_per_second"] is speed["ratio"] is None
    assert facts["memory"]["resident_bytes"] > facts["memory"]["weight_bytes"] >= stored


def test_drafts_are_timed_on_wish(minicpm: Command, model: Path) -> None:
    works = ("--prompts", "5", "--contexts", "0", "--batches", "1")
    run = minicpm("bench", str(model), *works, "--speculate", "ngram", "--json", *SHORT)
    assert (run.returncode, run.stderr) == (0, "")
    gains = json.loads(run.stdout)["speculation"]
    assert [gain["text"] for gain in gains] == ["copied text", "new text"]
    for gain in gains:
        assert gain["ratio"] == pytest.approx(gain["tokens_per_second"] / gain["plain_tokens_per_second"])
        assert gain["num_drafted_tokens"] >= gain["num_accepted_tokens"] >= 0
    run = minicpm("bench", str(model), *works, "--draft", str(model), *SHORT)
    assert run.returncode == 0
    assert "plain tokens/s" in run.stdout


def test_usual_works_that_a_short_model_cannot_hold_are_left_out(minicpm: Command, model: Path) -> None:
    run = minicpm("bench", str(model), "--json", *SHORT)
    works = [(s["phase"], s["num_tokens"], s["context"], s["batch"]) for s in json.loads(run.stdout)["speeds"]]
    prefills, decodes = [("prefill", 128, 0, 1), ("prefill", 512, 0, 1)], [("decode", 4, 0, n) for n in (1, 4, 16)]
    assert works == prefills + decodes


def test_the_table_names_every_work(minicpm: Command, model: Path) -> None:
    run = minicpm("bench", str(model), "--prompts", "20", "--contexts", "40", "--batches", "3", *SHORT)
    assert (run.returncode, run.stderr) == (0, "")
    for label in ("prefill 20", "decode, context 40", "decode, context 0, batch 3", "GB/s", "machine", "memory"):
        assert label in run.stdout
    assert "llama.cpp" not in run.stdout


@pytest.mark.parametrize(
    ("wish", "answer"),
    [
        (("--contexts", "9999"), "needs 10031 positions; the model has 512"),
        (("--prompts", "0"), "takes whole numbers of at least 1, got '0'"),
        (("--tokens", "many"), "takes whole numbers of at least 1, got 'many'"),
        (("--batches", "4,"), "takes whole numbers of at least 1, got ''"),
        (("--against", "./no-such-program"), "'./no-such-program' is no program"),
        (("--threads", "100000"), "threads"),
    ],
)
def test_wrong_wishes_are_one_line(minicpm: Command, model: Path, wish: tuple[str, ...], answer: str) -> None:
    run = minicpm("bench", str(model), *wish)
    assert (run.returncode, run.stdout) == (2, "")
    assert answer in run.stderr
    assert run.stderr.count("\n") == 1
