"""The GGUF reader on files made to hurt: each ends in one line that names the file and the byte."""

import os
import struct
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.unit.formats.model_files import entries_of, random_entries, vocabulary

from minicpm.architecture import ModelConfig
from minicpm.errors import FormatError
from minicpm.formats import gguf_metadata, gguf_strings
from minicpm.formats.gguf_config import config_from_gguf
from minicpm.formats.gguf_read import GGUFFile, open_gguf, parse_gguf
from minicpm.formats.gguf_write import write_gguf, write_gguf_model

U32, U64, STRING, ARRAY = 4, 10, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(pairs: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: int = 0, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join([*pairs, *tensors])
    return head + bytes(-len(head) % 32) + bytes(data)


def read(raw: bytes) -> GGUFFile:
    file = parse_gguf(np.frombuffer(raw, np.uint8), Path("x.gguf"))
    for key in file.metadata:
        file.metadata[key]
    return file


HOSTILE = {
    "magic": (b"GGML" + bytes(60), r"x\.gguf is not a GGUF file: it starts with b'GGML'"),
    "version 1": (gguf(version=1), "at byte 4: GGUF version 1 is not supported"),
    "big endian": (gguf(version=3 << 24), "at byte 4: a big-endian file is not supported"),
    "short": (b"GGUF\x03\0\0\0\1", "at byte 8: truncated: the tensor count takes 8 bytes, the file has 1 left"),
    "2^60 keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "claims 1152921504606846976 metadata keys"),
    "2^60 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims 1152921504606846976 tensors"),
    "49 bytes of 2^60 strings": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair("k", ARRAY, struct.pack("<IQ", STRING, 1 << 60)),
        r"at byte \d+: 'k' claims 1152921504606846976 items of at least 8 bytes",
    ),
    "2^63 numbers": (gguf([pair("k", ARRAY, struct.pack("<IQ", U64, 1 << 63))]), "'k' claims 9223372036854775808"),
    "key beyond": (gguf([struct.pack("<Q", 1 << 40) + bytes(8)]), "metadata key 0 claims 1099511627776 bytes"),
    "key not UTF-8": (gguf([pair(b"\xff\xfe", U32, bytes(4))]), "metadata key 0 is not valid UTF-8"),
    "key of control characters": (gguf([pair("a\nb", U32, bytes(4))]), r"'a\\nb'; printable characters are accepted"),
    "empty key": (gguf([pair("", U32, bytes(4))]), "metadata key 0 is ''"),
    "same key": (gguf([pair("k", U32, bytes(4))] * 2), "the metadata key 'k' occurs twice"),
    "type 13": (gguf([pair("k", 13, bytes(8))]), "'k' has the value type 13; GGUF knows 0 to 12"),
    "items of type 13": (gguf([pair("k", ARRAY, struct.pack("<IQ", 13, 1) + bytes(9))]), "'k' has items of type 13"),
    "truth of 2": (gguf([pair("k", 7, b"\2")]), "'k' is a truth value of 2"),
    "truths of 2": (gguf([pair("k", ARRAY, struct.pack("<IQ", 7, 1) + b"\2")]), "'k' holds truth values other than"),
    "string beyond": (gguf([pair("k", STRING, struct.pack("<Q", 99999))]), "truncated: 'k' takes 99999 bytes"),
    "item beyond": (
        gguf([pair("k", ARRAY, struct.pack("<IQQ", STRING, 1, 9999))]), "string 0 of 'k' does not end within the file"
    ),
    "item not UTF-8": (
        gguf([pair("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text(b"\xff"))]),
        r"a string of 'k' is not valid UTF-8: b'\\xff'",
    ),
    "deep": (
        gguf([pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9 + struct.pack("<IQ", U32, 0))]), "deeper than 4"
    ),
    "wide": (gguf([pair("k", ARRAY, struct.pack("<IQ", ARRAY, 5000) + bytes(5000 * 12))]), "more than 4096 nested"),
    "alignment 0": (gguf([pair("general.alignment", U32, bytes(4))]), "alignment must be a power of two"),
    "alignment 24": (gguf([pair("general.alignment", U32, struct.pack("<I", 24))]), "power of two up to 65536, got 24"),
    "alignment 2^31": (gguf([pair("general.alignment", U32, struct.pack("<I", 1 << 31))]), "power of two"),
    "alignment of text": (gguf([pair("general.alignment", STRING, text("32"))]), "got '32'"),
    "split": (
        gguf([pair("split.count", 2, b"\3\0"), pair("split.no", 2, b"\1\0")]),
        "part 2 of 3 of a split GGUF; join the parts first: llama-gguf-split --merge",
    ),
    "tensor of no name": (gguf(tensors=[tensor("", [8])], data=32), "the name of tensor 0 is ''"),
    "no dimension": (gguf(tensors=[tensor("t", [])], data=32), "'t' has 0 dimensions"),
    "5 dimensions": (gguf(tensors=[tensor("t", [1] * 5)], data=32), "'t' has 5 dimensions; 1 to 4"),
    "2^32 dimensions": (
        gguf(tensors=[text("t") + struct.pack("<I", 0xFFFFFFFF) + bytes(40)], data=32), "'t' has 4294967295 dimensions"
    ),
    "dimension 0": (gguf(tensors=[tensor("t", [8, 0])], data=32), "'t' has the impossible dimensions"),
    "product 2^66": (gguf(tensors=[tensor("t", [1 << 22] * 3)], data=32), "'t' has the impossible dimensions"),
    "product wraps to 16": (gguf(tensors=[tensor("t", [1 << 32, (1 << 32) + 16])], data=64), "impossible dimensions"),
    "unknown type": (gguf(tensors=[tensor("t", [8], 200)], data=32), "'t' has the unknown type 200; supported: F32"),
    "named type": (gguf(tensors=[tensor("t", [256], 23)], data=256), r"'t' has IQ4_XS \(type 23\); supported: F32"),
    "removed type": (gguf(tensors=[tensor("t", [32], 4)], data=32), "'t' has the unknown type 4"),
    "part of a block": (gguf(tensors=[tensor("t", [33], 2)], data=64), "'t' has rows of 33, no multiple of 32"),
    "offset 8": (gguf(tensors=[tensor("t", [8], 0, 8)], data=64), "offset 8, no multiple of the alignment 32"),
    "offset 2^64-32": (gguf(tensors=[tensor("t", [8], 0, (1 << 64) - 32)], data=64), "'t' of 32 bytes lies beyond"),
    "data beyond": (gguf(tensors=[tensor("t", [24])], data=64), "'t' ends at byte 160, the file has 128"),
    "same tensor": (gguf(tensors=[tensor("t", [8]), tensor("t", [8], 0, 32)], data=64), "the tensor 't' occurs twice"),
    "overlap": (gguf(tensors=[tensor("t", [16]), tensor("u", [8], 0, 32)], data=64), "the tensor 'u' overlaps 't'"),
    "same place": (gguf(tensors=[tensor("t", [8]), tensor("u", [8])], data=64), "the tensor 'u' overlaps 't'"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(case: str) -> None:
    raw, message = HOSTILE[case]
    with pytest.raises(FormatError, match=message) as caught:
        read(raw)
    assert "\n" not in str(caught.value)
    assert "x.gguf" in str(caught.value)


def test_claims_cost_neither_memory_nor_time() -> None:
    """The bound on time is generous: what it must catch is a loop over 2^60 items."""
    start = time.monotonic()
    tracemalloc.start()
    try:
        for raw, _ in HOSTILE.values():
            with pytest.raises(FormatError):
                read(raw)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 10


def test_every_truncation_of_a_real_file_is_refused(tmp_path: Path, tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(num_hidden_layers=1)
    path = tmp_path / "a.gguf"
    write_gguf_model(path, config, random_entries(config), vocabulary(331))
    raw = path.read_bytes()
    header = open_gguf(path).tensors["token_embd.weight"].offset
    for size in [*range(4, header, 37), header, len(raw) - 33]:
        with pytest.raises(FormatError, match=r"truncated|claims|not end within|header"):
            read(raw[:size])
    read(raw)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "empty": "is empty",
        "none": "No such file",
        "pipe": "not a regular file",
        ".": "director",
    }.items():
        with pytest.raises(FormatError, match=message):
            open_gguf(tmp_path / name)


def test_every_value_type_comes_back(tmp_path: Path) -> None:
    values = {
        "u8": np.uint8(200), "i8": np.int8(-3), "u16": np.uint16(9), "i16": np.int16(-9), "u32": np.uint32(1 << 31),
        "i32": np.int32(-1), "f32": np.float32(0.1), "true": True, "text": "naïve 词\n", "u64": np.uint64(1 << 63),
        "i64": np.int64(-(1 << 40)), "f64": np.float64(0.1), "int": 7, "negative": -7, "large": 1 << 40, "float": 0.5,
        "ints": [1, -2, 3], "floats": [0.5, -1.0], "truths": [True, False], "texts": ["", "a", "词" * 100], "none": [],
        "nested": [[1, 2], [3]], "bytes": np.arange(5, dtype=np.uint8),
    }  # fmt: skip
    write_gguf(tmp_path / "a.gguf", values, {})
    file = open_gguf(tmp_path / "a.gguf")
    assert dict(file.metadata) == {
        key: value.tolist() if hasattr(value, "tolist") else value for key, value in values.items()
    }
    assert list(file.metadata) == list(values)
    assert (file.metadata.count("texts"), file.metadata.count("int"), file.metadata.count("?")) == (3, 0, 0)


LISTS = {
    "plain": [f"token{i}" for i in range(500)],
    "empty ones": ["", "a", ""] * 200,
    "all empty": [""] * 300,
    "long ones": ["a" * 255, "b" * 256, "c" * 1000, "d"] * 50,
    "zero bytes": ["\0" * n + "x" for n in range(20)] * 20,
    "control bytes": ["\1", "\2\0\0\0", "\0\0\0\0\0\0\0\3"] * 60,
    "few": ["a", "b"],
}


@pytest.mark.parametrize("case", LISTS)
def test_the_fast_way_through_a_vocabulary_gives_what_the_slow_one_gives(case: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"before": 1, "texts": LISTS[case], "after": "end"}, {})
    metadata = open_gguf(tmp_path / "a.gguf").metadata
    assert metadata["texts"] == LISTS[case]
    assert metadata["after"] == "end"


def test_real_vocabularies_take_the_fast_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf", {"texts": LISTS["plain"]}, {})
    monkeypatch.setattr(gguf_strings, "_walk_strings", None)
    monkeypatch.setattr(gguf_strings, "_decode_one_by_one", None)
    assert open_gguf(tmp_path / "a.gguf").metadata["texts"] == LISTS["plain"]


def test_arrays_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_metadata, "MAX_ITEMS", 10)
    numbers = struct.pack("<IQ", U32, 6) + bytes(24)
    read(gguf([pair("a", ARRAY, numbers)]))
    with pytest.raises(FormatError, match="with 'b' the arrays have 12 items; at most 10"):
        read(gguf([pair("a", ARRAY, numbers), pair("b", ARRAY, numbers)]))


def test_version_2_and_another_alignment(tmp_path: Path) -> None:
    entries = entries_of({"t": np.arange(40, dtype=np.float32).reshape(5, 8), "u": np.ones(3, np.float32)})
    write_gguf(tmp_path / "a.gguf", {"general.alignment": 256}, entries)
    raw = bytearray((tmp_path / "a.gguf").read_bytes())
    raw[4] = 2
    file = read(bytes(raw))
    assert file.version == 2
    assert file.tensors["u"].offset % 256 == 0
    assert np.array_equal(file.weight("t").decode(), np.arange(40).reshape(5, 8))
    assert file.weight("u").shape == (3,)


def test_a_weight_is_a_view_of_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {}, entries_of({"t": np.ones((5, 8), np.float32)}))
    data = open_gguf(tmp_path / "a.gguf").weight("t").data
    assert not data.flags.owndata
    assert not data.flags.writeable


def test_the_offset_is_that_of_the_broken_string() -> None:
    """Also where its bytes occur in an earlier one: é ends in 0xA9."""
    raw = gguf([pair("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("é") + text(b"\xa9"))])
    with pytest.raises(FormatError, match=rf"at byte {raw.rindex(0xA9)}: a string of 'k'"):
        read(raw)


def test_messages_stay_short_whatever_the_file_holds() -> None:
    long = ["x" * 1000] * 1000
    with pytest.raises(FormatError) as caught:
        config_from_gguf({"general.architecture": long}, vocab_size=9, is_tied=True)
    assert len(str(caught.value)) < 300
