"""safetensors files and shards: what is written, and every way in which a header can lie."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.formats.model_files import entries_of, random_entries

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, FormatError
from minicpm.formats.safetensors_read import open_safetensors, open_shards, parse_safetensors
from minicpm.formats.safetensors_write import write_safetensors, write_safetensors_model
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry


def raw(header: Any, data: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def place(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "short": (b"abc", "is no safetensors file or is truncated"),
    "length": ((1 << 60).to_bytes(8, "little") + b"{}", "its header claims 1152921504606846976 bytes"),
    "too long": ((9).to_bytes(8, "little") + b"{}", "its header claims 9 bytes, the file has 10"),
    "no JSON": (raw(b"{{"), "the header is not valid JSON"),
    "no UTF-8": (raw(b"\xff\xfe"), "the header is not valid JSON"),
    "no object": (raw(b"[]"), "must hold a JSON object, got list"),
    "nested": (raw(b"[" * 100_000), "the header is not valid JSON"),
    "twice": (raw(b'{"a": 1, "a": 2}'), "the name 'a' occurs twice"),
    "NaN": (raw(b'{"a": NaN}'), "NaN is not JSON"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__ must map names to text"),
    "no place": (raw({"a": 3}), "the tensor 'a' must have dtype, shape and data_offsets"),
    "part of a place": (raw({"a": {"dtype": "F32"}}), "must have dtype, shape and data_offsets"),
    "dtype": (raw({"a": place("Q4")}, 8), "'a' has the unknown dtype 'Q4'"),
    "dtype list": (raw({"a": place([1])}, 8), "has the unknown dtype"),
    "negative": (raw({"a": place(shape=[-2])}, 8), "shape must be a list of whole numbers"),
    "fraction": (raw({"a": place(shape=[2.0])}, 8), "shape must be a list of whole numbers"),
    "truth": (raw({"a": place(shape=[True])}, 8), "shape must be a list of whole numbers"),
    "huge": (raw({"a": place(shape=[1 << 61] * 8)}, 8), "takes .* bytes, not 8"),
    "axes": (raw({"a": place(shape=[1] * 9)}, 8), "has 9 axes and 2 offsets"),
    "offsets": (raw({"a": place(offsets=[0])}, 8), "has 1 axes and 1 offsets"),
    "backwards": (raw({"a": place(offsets=[8, 0])}, 8), "claims the bytes 8 to 0 of 8: truncated or broken"),
    "beyond": (raw({"a": place()}, 7), "claims the bytes 0 to 8 of 7: truncated or broken"),
    "size": (raw({"a": place(shape=[3])}, 8), r"of shape \(3,\) and F32 takes 12 bytes, not 8"),
    "overlap": (raw({"a": place(), "b": place(offsets=[4, 12])}, 12), "'b' overlaps 'a'"),
    "same": (raw({"a": place(), "b": place()}, 8), "'b' overlaps 'a'"),
    "gap": (raw({"a": place(), "b": place(offsets=[12, 20])}, 20), "'b' leaves a gap of 4 bytes after 'a'"),
    "rest": (raw({"a": place()}, 9), "the tensors end at byte .*, the file has"),
    "control": (raw({"a\n": place()}, 8), "has a name that cannot be printed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_lying_header_is_refused_in_one_line(case: str) -> None:
    data, message = HOSTILE[case]
    with pytest.raises(FormatError, match=message) as caught:
        parse_safetensors(np.frombuffer(data, np.uint8), Path("x.safetensors"))
    assert "\n" not in str(caught.value)
    assert "x.safetensors" in str(caught.value)


def test_dtypes_that_are_no_weights() -> None:
    file = parse_safetensors(np.frombuffer(raw({"a": place("I64", [1])}, 8), np.uint8), Path("x"))
    with pytest.raises(FormatError, match="a has the unsupported dtype I64; known: F32, F16, BF16"):
        file.weight("a")
    for shape in ([], [0, 4]):
        size = 0 if 0 in shape else 4
        file = parse_safetensors(np.frombuffer(raw({"a": place("F32", shape, [0, size])}, size), np.uint8), Path("x"))
        with pytest.raises(FormatError, match="which no weight has"):
            file.weight("a")


@pytest.mark.parametrize("block_type", ["F32", "F16", "BF16"])
def test_what_is_written_is_read(tmp_path: Path, tiny_config: ModelConfig, block_type: str) -> None:
    entries = random_entries(tiny_config, block_type)
    old = os.umask(0o022)
    try:
        files = write_safetensors_model(tmp_path, entries)
    finally:
        os.umask(old)
    assert files == [tmp_path / "model.safetensors"]
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o644
    file = open_safetensors(files[0])
    assert file.metadata == {"format": "pt"}
    assert list(file.tensors) == list(entries)
    for name, entry in entries.items():
        weight = file.weight(name)
        assert (weight.shape, weight.block_type) == (entry.shape, entry.block_type)
        assert np.array_equal(weight.data, entry.make().data)
        assert not weight.data.flags.owndata


def test_shards(tmp_path: Path, tiny_config: ModelConfig) -> None:
    entries = random_entries(tiny_config, "BF16")
    files = write_safetensors_model(tmp_path, entries, max_shard_bytes=60_000)
    assert files[-1].name == "model.safetensors.index.json"
    assert files[0].name == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    assert sorted(files) == sorted(tmp_path.iterdir())
    largest = max(entry.num_bytes for entry in entries.values())
    assert all(path.stat().st_size <= max(largest, 60_000) + 10_000 for path in files)
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(entry.num_bytes for entry in entries.values())
    assert list(index["weight_map"]) == list(entries)
    opened = open_shards(tmp_path)
    assert set(opened) == set(entries)
    for name, file in opened.items():
        assert np.array_equal(file.weight(name).data, entries[name].make().data)


def test_missing_shards_are_all_named(tmp_path: Path, tiny_config: ModelConfig) -> None:
    files = write_safetensors_model(tmp_path, random_entries(tiny_config), max_shard_bytes=100_000)
    files[0].unlink()
    files[2].unlink()
    with pytest.raises(
        CheckpointError, match=rf"2 of {len(files) - 1} shards are missing: {files[0].name}, {files[2].name}"
    ):
        open_shards(tmp_path)


def test_shards_and_index_that_disagree_are_listed_in_full(tmp_path: Path) -> None:
    entries = entries_of({name: np.ones(8, np.float32) for name in "abcd"})
    *_, index = write_safetensors_model(tmp_path, entries, max_shard_bytes=32)
    table = json.loads(index.read_text())
    table["weight_map"]["a"], table["weight_map"]["b"] = table["weight_map"]["b"], table["weight_map"]["a"]
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"a is not in .*; b is not in .*; a is in .*; b is in .*"):
        open_shards(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "c:b", "a\nb"])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match="is not a file of the folder itself; that is refused") as caught:
        open_shards(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_an_index_that_is_none(tmp_path: Path, index: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="weight_map must map tensor names to file names"):
        open_shards(tmp_path)


def test_block_types_and_broken_promises_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="t is Q8_0; safetensors holds F32, F16, BF16"):
        write_safetensors(tmp_path / "a", entries_of({"t": np.ones((2, 32), np.float32)}, "Q8_0"))
    weight = Weight.from_array(np.ones(8, np.float32))
    with pytest.raises(CheckpointError, match="t was announced as BF16"):
        write_safetensors(tmp_path / "a", {"t": WeightEntry((8,), "BF16", lambda: weight)})
    assert not list(tmp_path.iterdir())
