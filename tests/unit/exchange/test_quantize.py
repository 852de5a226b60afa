"""From a model to a quantized file: its size to the byte, its closeness, what an interruption and a mistake leave."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.exchange.conftest import FolderWriter, random_entries

from minicpm.architecture import PRESETS, ModelConfig
from minicpm.cli.main import run
from minicpm.errors import ConfigError, DataError, MiniCPMError
from minicpm.exchange.compare import compare
from minicpm.exchange.convert import convert
from minicpm.exchange.quantize import quantize
from minicpm.exchange.recipe import Recipe
from minicpm.formats.blocks import block_type
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry
from minicpm.model.loading import load_model
from minicpm.quant.judge import final_hidden, head_matrix
from minicpm.quant.precision import tensor_bytes, uniform_types
from minicpm.quant.windows import pack, pack_evenly, read_token_rows
from minicpm.tokenizer import Tokenizer

WORDS = ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "it", "is", "already", "2024"]


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        {"instruction": " ".join(rng.choice(WORDS, 12)), "output": " ".join(rng.choice(WORDS, 20))} for _ in range(120)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(chat: Path, **changes: object) -> Recipe:
    fields: dict[str, object] = {"calibration": (str(chat),), "windows": 12, "window_tokens": 128, "heldout_windows": 4}
    return Recipe(**(fields | changes))


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_is_as_large_as_its_blocks_and_every_matrix_is_packed(
    tmp_path: Path, tiny_config: ModelConfig, write_minicpm: FolderWriter, chat: Path, tied: bool
) -> None:
    config = tiny_config.replace(tie_word_embeddings=tied)
    result = quantize(write_minicpm(config), tmp_path / "q.gguf", recipe(chat))
    written = open_checkpoint(result.path)
    for name, entry in written.weights.entries.items():
        is_end = name in ("model.embed_tokens.weight", "lm_head.weight")
        wanted = "F32" if len(entry.shape) == 1 else "Q8_0" if is_end else "Q4_0"
        assert entry.block_type == wanted, name
    shapes = config.weight_shapes()
    by_hand = sum(
        4 * shape[0] if len(shape) == 1 else shape[0] * shape[1] // 32 * (34 if shape[0] == config.vocab_size else 18)
        for shape in shapes.values()
    )
    assert written.num_bytes == result.tensor_bytes == by_hand
    assert result.bits_per_weight == pytest.approx(8 * by_hand / config.num_parameters().total)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("to", ["q4_0", "q4_1"])
def test_calibration_brings_the_file_closer(tmp_path: Path, write_minicpm: FolderWriter, chat: Path, to: str) -> None:
    source = write_minicpm()
    kl = {
        method: quantize(source, tmp_path / f"{method}.gguf", recipe(chat, to=to, method=method)).closeness.kl
        for method in ("nearest", "gptq", "awq+gptq")
    }
    assert kl["gptq"] < 0.8 * kl["nearest"]
    assert kl["awq+gptq"] < 0.8 * kl["nearest"]


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_a_folder_holds_the_rounded_model_to_the_bit(
    tmp_path: Path, tiny_config: ModelConfig, write_minicpm: FolderWriter, chat: Path, to: str
) -> None:
    source, path = write_minicpm(), tmp_path / "packed"
    result = quantize(source, path, recipe(chat, to=to))
    nearest = quantize(source, tmp_path / "nearest", recipe(chat, to=to, method="nearest"))
    assert result.closeness.kl < 0.8 * nearest.closeness.kl
    written = open_checkpoint(path)
    kind = {"gptq": "Q4_0", "awq": "Q5_0"}[to]
    assert written.weights.block_types() == {kind: 35, "F16": 12}
    layers = [shape for name, shape in tiny_config.weight_shapes().items() if "proj" in name]
    packed = sum(
        r * c // 2 + r * (c // 32) * 2 + r * (c // 32) // 2 + (4 * c if to == "gptq" else 0) for r, c in layers
    )
    norms = sum(shape[0] for shape in tiny_config.weight_shapes().values() if len(shape) == 1)
    assert result.tensor_bytes == packed + 2 * norms + 2 * 331 * 96
    header = int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")
    assert (path / "model.safetensors").stat().st_size == 8 + header + result.tensor_bytes
    settings = json.loads((path / "config.json").read_text())
    assert settings["quantization_config"]["quant_method"] == to
    assert settings["quantization_config"]["group_size"] == 32
    # A GGUF file of it holds the same blocks, and so computes the same.
    gguf = convert(path, tmp_path / "q.gguf", to="gguf").path
    model, same = (open_checkpoint(place).weights for place in (path, gguf))
    for name in model:
        np.testing.assert_array_equal(model[name].decode(), same[name].decode())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["q4_0", "awq"])
def test_recovery_brings_the_file_closer_at_the_same_size(
    tmp_path: Path, write_minicpm: FolderWriter, chat: Path, to: str
) -> None:
    source = write_minicpm()
    before = {path: path.read_bytes() for path in source.rglob("*.safetensors")}
    plain = quantize(source, tmp_path / "plain.gguf", recipe(chat, to=to))
    tuned = quantize(source, tmp_path / "tuned.gguf", recipe(chat, to=to, recover=12, recover_rate=1e-2))
    assert tuned.before_recovery == plain.closeness
    assert tuned.closeness.kl < 0.9 * plain.closeness.kl
    assert (tuned.tensor_bytes, tuned.file_bytes) == (plain.tensor_bytes, plain.file_bytes)
    first, second = (open_checkpoint(result.path).weights for result in (plain, tuned))
    assert first.block_types() == second.block_types()
    assert {path: path.read_bytes() for path in source.rglob("*.safetensors")} == before
    again = quantize(source, tmp_path / "again.gguf", recipe(chat, to=to, recover=12, recover_rate=1e-2))
    for name in second:
        assert open_checkpoint(again.path).weights[name].data.tobytes() == second[name].data.tobytes()


def test_super_blocks_where_rows_hold_them(
    tmp_path: Path, tiny_config: ModelConfig, write_minicpm: FolderWriter, chat: Path
) -> None:
    config = tiny_config.replace(hidden_size=256, intermediate_size=512, num_hidden_layers=2, head_dim=16)
    source = write_minicpm(config)
    result = quantize(source, tmp_path / "q.gguf", recipe(chat, to="q4_k"))
    types = open_checkpoint(result.path).weights.block_types()
    # The output projection has rows of 96 weights.
    assert types == {"Q4_K": 12, "Q5_0": 2, "F32": 5, "Q6_K": 1}
    nearest = quantize(source, tmp_path / "n.gguf", recipe(chat, to="q4_k", method="nearest"))
    assert result.closeness.kl < 0.8 * nearest.closeness.kl


def test_scaled_inputs_leave_the_function_as_it_was(tmp_path: Path, write_minicpm: FolderWriter, chat: Path) -> None:
    result = quantize(write_minicpm(), tmp_path / "q.gguf", recipe(chat, to="q8_0", method="awq"))
    assert result.closeness.kl < 1e-3
    source = open_checkpoint(tmp_path / "source").weights["model.layers.0.input_layernorm.weight"].decode()
    assert (
        np.abs(open_checkpoint(result.path).weights["model.layers.0.input_layernorm.weight"].decode() - source).max()
        > 1e-3
    )


def test_streaming_is_the_model(write_minicpm: FolderWriter, chat: Path) -> None:
    checkpoint = open_checkpoint(write_minicpm())
    tokenizer = Tokenizer.from_folder(checkpoint.path)
    windows = pack(read_token_rows(tokenizer, str(chat)), "chat", 64, 3)
    states = final_hidden(checkpoint.config, checkpoint.weights, windows)
    logits = states @ head_matrix(checkpoint.config, checkpoint.weights).T
    model = load_model(checkpoint.config, checkpoint.weights, dtype=torch.float32)
    whole = model(windows.ids, document_ids=windows.document_ids)[:, :-1][windows.is_scored]
    assert (logits - whole).abs().max() < 2e-4 * whole.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["q4_0", "q4_1", "q4_k"])
def test_engine_and_llama_cpp_agree_on_the_file(
    tmp_path: Path, tiny_config: ModelConfig, write_minicpm: FolderWriter, chat: Path, to: str
) -> None:
    pytest.importorskip("xllamacpp")
    config = tiny_config.replace(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    path = quantize(write_minicpm(config), tmp_path / "q.gguf", recipe(chat, to=to, method="search")).path
    exact = compare(f"torch:{path}", f"engine:{path}", dtype_a="fp32", max_tokens=24).agreement
    theirs = compare(f"engine:{path}", f"llama.cpp:{path}", max_tokens=24).agreement
    # Ours keeps 16 bits of the activations, llama.cpp 8.
    assert exact.mean_kl < 1e-4
    assert theirs.mean_kl < 2e-2


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, write_minicpm: FolderWriter, chat: Path) -> None:
    source = write_minicpm()
    whole = quantize(source, tmp_path / "whole.gguf", recipe(chat)).path.read_bytes()
    seen = []

    def stop(name: str, done: int, total: int) -> None:
        seen.append(name)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "q.gguf", recipe(chat), progress=stop)
    assert not (tmp_path / "q.gguf").exists()
    parts = sorted((tmp_path / ".q.gguf.quantize").glob("layer_*"))
    assert len(parts) == 3
    times = [part.stat().st_mtime_ns for part in parts]
    kept = []
    quantize(
        source, tmp_path / "q.gguf", recipe(chat),
        progress=lambda name, done, total: kept.append([part.stat().st_mtime_ns for part in parts]),
    )  # fmt: skip
    assert kept[-1] == times
    assert (tmp_path / "q.gguf").read_bytes() == whole


def test_several_texts_fill_as_many_windows_each(tmp_path: Path, write_minicpm: FolderWriter, chat: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_minicpm())
    texts = {"long": read_token_rows(tokenizer, str(chat)), "short": read_token_rows(tokenizer, str(chat))[:40]}
    windows = pack_evenly(texts, 64, 7)
    assert windows.ids.shape == (7, 64)
    assert windows.origin == "long, short"
    for name, start, stop in (("long", 0, 4), ("short", 4, 7)):
        alone = pack(texts[name], name, 64, stop - start)
        torch.testing.assert_close(windows.ids[start:stop], alone.ids)
        torch.testing.assert_close(windows.document_ids[start:stop], alone.document_ids)
    with pytest.raises(DataError, match="2 texts do not fit 1 windows"):
        pack_evenly(texts, 64, 1)
    second = tmp_path / "second.jsonl"
    second.write_text(chat.read_text())
    words = ["quantize", str(tmp_path / "source"), str(tmp_path / "q.gguf"), "--to", "q4_0", "--windows", "4"]
    words += ["--calibration", str(chat), "--calibration", str(second), "--heldout-windows", "2"]
    assert run([*words, "--report", str(tmp_path / "report.json")]) == 0
    assert str(second) in json.loads((tmp_path / "report.json").read_text())["heldout"]


def test_finer_types_fill_a_budget(
    tmp_path: Path, write_minicpm: FolderWriter, tiny_config: ModelConfig, chat: Path
) -> None:
    source = write_minicpm()
    least = tensor_bytes(tiny_config, uniform_types(tiny_config, "Q4_0"))
    budget = int(least * 1.15)
    plain = quantize(source, tmp_path / "plain.gguf", recipe(chat))
    mixed = quantize(source, tmp_path / "mixed.gguf", recipe(chat, budget_bytes=budget))
    assert least < mixed.tensor_bytes <= budget
    assert len(open_checkpoint(mixed.path).weights.block_types()) > 3
    assert mixed.closeness.kl < plain.closeness.kl
    with pytest.raises(ConfigError, match="is the least that these types take"):
        quantize(source, tmp_path / "small.gguf", recipe(chat, budget_bytes=least - 1))


def test_the_2b_shape_fits_the_bar_with_its_embedding_quantized() -> None:
    config = PRESETS["minicpm-2b"]
    types = uniform_types(config, "Q4_0")
    assert types["model.embed_tokens.weight"] == "Q6_K"
    parts = config.num_parameters()
    by_hand = parts.linear // 32 * 18 + parts.embedding // 256 * 210 + 4 * parts.norms
    assert tensor_bytes(config, types) == by_hand == 1_606_302_306
    assert all(block_type(kind).block_size > 1 for kind in types.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"to": "q3_k"}, ConfigError, "type 'q3_k' is not known"),
        ({"method": "magic"}, ConfigError, "method 'magic' is not known"),
        ({"embedding": "q1"}, ConfigError, "embedding type 'q1'"),
        ({"windows": 0}, ConfigError, "windows must be at least 1"),
        ({"to": "gptq", "group_size": 64}, ConfigError, "groups of 64: they must divide 96"),
        ({"to": "awq", "group_size": 48}, ConfigError, "group size 48 is not known for awq"),
        ({"group_size": 32}, ConfigError, "group size 32 is not known for q4_0"),
        ({"to": "gptq", "embedding": "q8_0"}, ConfigError, "a gptq folder has one type"),
        ({"shrinkage": 1.5}, ConfigError, "shrinkage must be from 0 to 1, got 1.5"),
        ({"window_tokens": 1}, ConfigError, "window_tokens must be at least 2"),
        ({"recover": -1}, ConfigError, "recover must be at least 0 steps, got -1"),
        ({"recover_rate": 2.0}, ConfigError, "recover_rate must be between 0 and 1, got 2.0"),
        ({"damping": 0.0}, ConfigError, "damping must be between 0 and 1"),
        ({"calibration": ("nowhere.jsonl",)}, DataError, "nowhere.jsonl does not exist"),
    ],
)
def test_a_mistake_leaves_nothing(
    tmp_path: Path,
    write_minicpm: FolderWriter,
    chat: Path,
    changes: dict[str, object],
    error: type[MiniCPMError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        quantize(write_minicpm(), tmp_path / "q.gguf", recipe(chat, **changes))
    assert not list(tmp_path.glob("*.gguf"))
    assert not list(tmp_path.glob(".q*"))


def test_too_little_text_a_quantized_source_and_broken_weights_are_refused(
    tmp_path: Path, tiny_config: ModelConfig, write_minicpm: FolderWriter, chat: Path
) -> None:
    entries = random_entries(tiny_config)
    name = "model.layers.2.mlp.up_proj.weight"
    broken = entries[name].make().decode()
    broken[3, 4] = np.nan
    entries[name] = WeightEntry.of(Weight.from_array(broken, "BF16"))
    source = write_minicpm(entries=entries)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chat.read_text().splitlines(keepends=True)[:31]))
    with pytest.raises(DataError, match="31 rows of text; calibration needs at least 32"):
        quantize(source, tmp_path / "q.gguf", recipe(few))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        quantize(source, tmp_path / "q.gguf", recipe(tmp_path / "empty.jsonl"))
    with pytest.raises(MiniCPMError, match=r"layers\.2"):
        quantize(source, tmp_path / "q.gguf", recipe(chat))
    assert not (tmp_path / "q.gguf").exists()


def test_a_width_that_no_block_divides_is_named(
    tmp_path: Path, tiny_config: ModelConfig, write_minicpm: FolderWriter, chat: Path
) -> None:
    source = write_minicpm(tiny_config.replace(intermediate_size=150))
    with pytest.raises(ConfigError, match="rows of 150 weights cannot be stored as Q4_0"):
        quantize(source, tmp_path / "q.gguf", recipe(chat))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "piqa", "--data", "."], "piqa"),
        (["--tasks", "nosuch"], "no task 'nosuch'"),
        (["--data", "nowhere"], "--data: nowhere is no folder"),
        (["--report", "nowhere/report.json"], "--report: nowhere is no folder"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--bits", "nan"], "--bits must be between 0 and 32, got nan"),
        (["--bits", "4.75", "--size", "1GB"], "give --bits or --size, not both"),
        (["--max-kl", "nan"], "--max-kl must be at least 0 nats, got nan"),
        (["--size", "1KB"], "is the least that these types take"),
    ],
)
def test_options_are_checked_before_anything_is_rounded(
    tmp_path: Path,
    write_minicpm: FolderWriter,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    source = write_minicpm()
    monkeypatch.chdir(tmp_path)
    assert run(["quantize", str(source), "q.gguf", "--to", "q4_0", *words]) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.glob("*.gguf"), *tmp_path.glob(".q*")]
    assert run(["quantize", str(source), "nowhere/q.gguf", "--to", "q4_0"]) == 2
    assert "nowhere is no folder; make it first" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_the_verb_reports_refuses_and_writes_nothing_above_the_limit(
    tmp_path: Path, write_minicpm: FolderWriter, chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, path = write_minicpm(), tmp_path / "q.gguf"
    words = ["quantize", str(source), str(path), "--to", "q4_0", "--windows", "12", "--window-tokens", "128"]
    words += ["--heldout-windows", "4", "--calibration", str(chat)]
    assert run([*words, "--max-kl", "1e-9"]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert not path.exists()
    assert run([*words, "--report", str(tmp_path / "report.json"), "--max-kl", "10"]) == 0
    told = capsys.readouterr().out
    assert "bits a weight" in told
    assert "worst matrices" in told
    assert told.count("model.layers.") == 10
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tensor_bytes"] == open_checkpoint(path).num_bytes
    (task,) = report["tasks"]
    assert Path(task["task"]).stem == "continuation"
    assert task["difference"]["num_rows"] >= 4
    assert task["difference"]["difference"] == pytest.approx(task["b"]["value"] - task["a"]["value"])
    assert "which of four follows a held-out row" in told
    assert run(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(["quantize", str(path), str(tmp_path / "r.gguf"), "--to", "q4_0"]) == 2
    assert "is quantized already" in capsys.readouterr().err
