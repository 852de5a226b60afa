"""Any format into any other: bits that need not be lost are kept, files are whole, mistakes leave nothing behind."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.unit.exchange.conftest import FolderWriter, random_entries

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, ConfigError, FormatError, MiniCPMError
from minicpm.exchange.convert import convert
from minicpm.formats.blocks import BLOCK_TYPES
from minicpm.formats.checkpoint import Checkpoint, open_checkpoint
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry
from minicpm.tokenizer import Tokenizer

TEXT = "The lazy 狐狸 jumps\n\tover 2024  dogs. 🤗"


def weights_equal(a: Checkpoint, b: Checkpoint) -> None:
    assert set(a.weights) == set(b.weights)
    for name in a.weights:
        assert np.array_equal(a.weights[name].decode(), b.weights[name].decode()), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("steps", [["granite"], ["llama"], ["granite", "llama"], ["llama", "granite"]])
def test_round_trips_are_exact(
    tmp_path: Path, tiny_config: ModelConfig, write_minicpm: FolderWriter, tied: bool, steps: list[str]
) -> None:
    source = write_minicpm(tiny_config.replace(tie_word_embeddings=tied))
    here = source
    for number, family in enumerate(steps):
        result = convert(here, tmp_path / f"{number}-{family}", to=family, dtype="fp32")
        assert result.agreement is not None
        assert result.agreement.max_delta_logprob < 1e-4
        assert result.agreement.top1 == 1
        here = result.path
    back = convert(here, tmp_path / "back", to="minicpm", dtype="bf16").path
    weights_equal(open_checkpoint(source), open_checkpoint(back))
    assert open_checkpoint(back).config == open_checkpoint(source).config


@pytest.mark.parametrize("family", ["minicpm", "granite", "llama"])
def test_gguf_and_back_keeps_float_weights(tmp_path: Path, write_minicpm: FolderWriter, family: str) -> None:
    source = write_minicpm()
    file = convert(source, tmp_path / "m.gguf", to="gguf", dtype="fp32", family=family).path
    assert open_checkpoint(file).config.model_type == family
    back = convert(file, tmp_path / "back", to="minicpm", dtype="bf16").path
    weights_equal(open_checkpoint(source), open_checkpoint(back))
    tokenizers = Tokenizer.from_folder(source), Tokenizer.from_gguf(open_checkpoint(file).metadata)
    assert tokenizers[0].encode(TEXT) == tokenizers[1].encode(TEXT) == Tokenizer.from_folder(back).encode(TEXT)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "fp16", "bf16"])
def test_tensor_data_has_the_size_of_its_blocks(
    tmp_path: Path, tiny_config: ModelConfig, write_minicpm: FolderWriter, dtype: str
) -> None:
    result = convert(write_minicpm(), tmp_path / "m.gguf", to="gguf", dtype=dtype)
    kind = BLOCK_TYPES[{"fp16": "F16", "bf16": "BF16"}.get(dtype, dtype.upper())]
    expected = 0
    for shape in tiny_config.weight_shapes().values():
        matrix = math.prod(shape[:-1]) * shape[-1] // kind.block_size * kind.block_bytes
        expected += 4 * shape[0] if len(shape) == 1 else matrix
    assert result.tensor_bytes == expected
    assert set(result.block_types) == {kind.name, "F32"}


def test_super_blocks_fall_back_where_rows_do_not_fit(tmp_path: Path, write_minicpm: FolderWriter) -> None:
    result = convert(write_minicpm(), tmp_path / "m.gguf", to="gguf", dtype="q4_k")
    assert set(result.block_types) == {"Q5_0", "F32"}


def test_a_folder_is_whole_and_says_what_it_is(tmp_path: Path, write_minicpm: FolderWriter) -> None:
    source = write_minicpm()
    folder = convert(source, tmp_path / "out", to="minicpm").path
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md",
        "SHA256SUMS",
        "config.json",
        "configuration_minicpm.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_minicpm.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        names.remove(name)
    assert names == {"SHA256SUMS"}
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_minicpm.MiniCPMForCausalLM"
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "中文" in card
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o666 & ~mask
    assert Tokenizer.from_folder(folder).encode(TEXT) == Tokenizer.from_folder(source).encode(TEXT)


def test_quantized_sources_become_half_precision_folders(tmp_path: Path, write_minicpm: FolderWriter) -> None:
    file = convert(write_minicpm(), tmp_path / "m.gguf", to="gguf", dtype="q4_1").path
    result = convert(file, tmp_path / "out", to="granite")
    assert set(result.block_types) == {"F16"}
    assert result.agreement is not None
    assert result.agreement.mean_kl < 1e-4


@pytest.mark.parametrize("family", ["minicpm", "granite"])
def test_rows_beyond_the_vocabulary_get_names(
    tmp_path: Path, tiny_config: ModelConfig, write_minicpm: FolderWriter, family: str
) -> None:
    source = write_minicpm(tiny_config.replace(vocab_size=352))
    assert Tokenizer.from_folder(source).vocab_size < 352
    result = convert(source, tmp_path / "m.gguf", to="gguf", dtype="fp32", family=family)
    assert result.agreement is not None
    assert result.agreement.top1 == 1
    assert open_checkpoint(result.path).config.vocab_size == 352
    tokenizer = Tokenizer.from_gguf(open_checkpoint(result.path).metadata)
    for text in (TEXT, "[PAD340]"):
        assert tokenizer.encode(text) == Tokenizer.from_folder(source).encode(text)


def spoilt(config: ModelConfig, value: float, block_type: str) -> dict[str, WeightEntry]:
    entries = random_entries(config, block_type)
    name = "model.layers.2.mlp.up_proj.weight"
    values = entries[name].make().decode().copy()
    values[3, 5] = value
    weight = Weight.from_array(values, block_type)
    return entries | {name: WeightEntry(weight.shape, block_type, lambda: weight)}


def nothing_left(tmp_path: Path) -> bool:
    return {path.name for path in tmp_path.iterdir()} <= {"source"}


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (float("nan"), {"to": "granite"}, "up_proj.weight holds nan at row 3, column 5"),
        (float("inf"), {"to": "gguf", "dtype": "q8_0"}, "up_proj.weight holds inf"),
        (float("nan"), {"to": "granite", "dtype": "fp16"}, "up_proj.weight holds nan"),
        (1e6, {"to": "granite", "dtype": "fp16"}, "up_proj.weight"),
        (1e9, {"to": "gguf", "dtype": "q8_0"}, "up_proj.weight"),
    ],
)
def test_weights_that_cannot_be_held_are_named(
    tmp_path: Path,
    tiny_config: ModelConfig,
    write_minicpm: FolderWriter,
    value: float,
    options: dict[str, str],
    message: str,
) -> None:
    source = write_minicpm(entries=spoilt(tiny_config, value, "BF16"))
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", **options)
    assert nothing_left(tmp_path)


def drop_tensor(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def corrupt_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))


def pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def escape(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("damage", [drop_tensor, corrupt_vocabulary, pickle_instead, truncate, escape])
def test_broken_sources_leave_nothing_behind(
    tmp_path: Path, write_minicpm: FolderWriter, damage: Callable[[Path], None]
) -> None:
    source = write_minicpm()
    damage(source)
    with pytest.raises(MiniCPMError) as raised:
        convert(source, tmp_path / "out", to="granite")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_settings_that_do_not_fit(tmp_path: Path, write_minicpm: FolderWriter) -> None:
    source = write_minicpm()
    with pytest.raises(ConfigError, match="q4_0 needs --to gguf"):
        convert(source, tmp_path / "out", to="granite", dtype="q4_0")
    with pytest.raises(ConfigError, match="format 'onnx' is not known"):
        convert(source, tmp_path / "out", to="onnx")
    with pytest.raises(ConfigError, match="dtype 'int3' is not known"):
        convert(source, tmp_path / "out", to="gguf", dtype="int3")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, source, to="granite")
    with pytest.raises(FormatError, match="cannot read"):
        convert(tmp_path / "absent", tmp_path / "out", to="granite")
    assert nothing_left(tmp_path)


def test_no_space_left_leaves_nothing(
    tmp_path: Path, write_minicpm: FolderWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_minicpm()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    for to in ("gguf", "granite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(CheckpointError, match="No space left on device"):
                convert(source, tmp_path / "out", to=to)
        assert nothing_left(tmp_path)
