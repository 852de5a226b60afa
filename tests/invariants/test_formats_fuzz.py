"""Mutated files end in an error of ours or in a model, soon and within little memory; never in anything else."""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.formats.model_files import random_entries, vocabulary

from minicpm.architecture import ModelConfig
from minicpm.errors import MiniCPMError
from minicpm.formats.gguf_read import parse_gguf
from minicpm.formats.gguf_weights import gguf_config_and_entries
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.hf_config import config_from_hf
from minicpm.formats.safetensors_read import parse_safetensors
from minicpm.formats.safetensors_write import write_safetensors_model
from minicpm.formats.weight_map import check_shapes

CONFIG = ModelConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=270, scale_emb=12.0, scale_depth=1.4, dim_model_base=8.0,
)  # fmt: skip
NESTED = {"tokenizer.nested": [[1, 2], [3]], "tokenizer.empty": []}
# Generous for a slow machine: what they must catch is work or memory that follows a claimed size.
MAX_SECONDS, MAX_BYTES = 5.0, 8 << 20
fuzz = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, max_examples=300)


def read_gguf(raw: bytes) -> None:
    file = parse_gguf(np.frombuffer(raw, np.uint8), Path("x"))
    for key in file.metadata:
        file.metadata[key]
    config, entries = gguf_config_and_entries(file)
    check_shapes(entries, config, "x")
    for entry in entries.values():
        entry.make().decode()


def read_safetensors(raw: bytes) -> None:
    file = parse_safetensors(np.frombuffer(raw, np.uint8), Path("x"))
    for name in file.tensors:
        file.weight(name).decode()


def survives(read: Callable[[bytes], None], raw: bytes) -> bool:
    """Whether `raw` was read; an error of ours is as good, in one line and in time."""
    start = time.monotonic()
    message = None
    try:
        read(raw)
    except MiniCPMError as error:
        message = str(error)
    assert time.monotonic() - start < MAX_SECONDS
    assert message is None or "\n" not in message
    return message is None


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "a.gguf"
    write_gguf_model(path, CONFIG, random_entries(CONFIG, "Q8_0"), vocabulary(270) | NESTED)
    return path.read_bytes()


@pytest.fixture(scope="module")
def safetensors_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    (path,) = write_safetensors_model(tmp_path_factory.mktemp("fuzz"), random_entries(CONFIG, "BF16"))
    return path.read_bytes()


def mutate(raw: bytes, header_bytes: int, rng: random.Random) -> bytes:
    """Up to four changes: a byte, a number, a type, a cut, an insertion, a copy, the end of the file."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(header_bytes, len(data)))
        other = rng.randrange(min(header_bytes, len(data)))
        large = rng.choice([0, 1, 1 << 60, 1 << 63, (1 << 64) - 1, len(data), rng.randrange(1 << 32)])
        small = rng.choice([0, 1, 8, 9, 12, 1 << 31, (1 << 32) - 1])
        match rng.randrange(7):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at : at + 8] = struct.pack("<Q", large)
            case 2:
                data[at : at + 4] = struct.pack("<I", small)
            case 3:
                del data[at : at + rng.randrange(1, 64)]
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 16))
            case 5:
                data[at : at + 32] = data[other : other + 32]
            case 6:
                del data[rng.randrange(1, len(data) + 1) :]
        if not data:
            return b"\0"
    return bytes(data)


@fuzz
@given(seed=st.integers(0, 1 << 32))
def test_mutated_gguf(gguf_file: bytes, seed: int) -> None:
    survives(read_gguf, mutate(gguf_file, 9000, random.Random(seed)))


@fuzz
@given(seed=st.integers(0, 1 << 32))
def test_mutated_safetensors(safetensors_file: bytes, seed: int) -> None:
    survives(read_safetensors, mutate(safetensors_file, 2000, random.Random(seed)))


@fuzz
@given(raw=st.binary(max_size=300))
def test_random_bytes_after_the_magic(raw: bytes) -> None:
    survives(read_gguf, b"GGUF" + struct.pack("<I", 3) + raw)
    survives(read_gguf, b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + raw)
    survives(read_safetensors, raw)
    survives(read_safetensors, len(raw).to_bytes(8, "little") + raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 1 << 64) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@fuzz
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from(["F32", "BF16", "I64"]) | JSON, "shape": st.lists(st.integers(-1, 5)) | JSON,
                  "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON},
) | JSON))  # fmt: skip
def test_safetensors_headers_of_any_json(header: Any) -> None:
    text = json.dumps(header).encode()
    survives(read_safetensors, len(text).to_bytes(8, "little") + text + bytes(40))


@fuzz
@given(key=st.sampled_from([*sorted(ModelConfig.__dataclass_fields__), "rope_parameters", "num_experts"]), value=JSON)
def test_any_value_under_any_key_of_a_config(key: str, value: Any) -> None:
    plain = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 9,
    }
    for model_type in ("minicpm", "llama", "granite"):
        survives(
            lambda raw: config_from_hf(json.loads(raw)),
            json.dumps({"model_type": model_type, **plain, key: value}).encode(),
        )


def test_memory_follows_the_file_not_its_claims(gguf_file: bytes) -> None:
    rng = random.Random(0)
    tracemalloc.start()
    try:
        for _ in range(150):
            survives(read_gguf, mutate(gguf_file, 9000, rng))
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()


def test_the_fuzz_reaches_deep(gguf_file: bytes) -> None:
    """Some mutants still are models and others fail at every stage, else the tests above would test little."""
    rng, seen = random.Random(1), set()
    stages = {"truncated", "UTF-8", "value type", "claims", "dimensions", "no known name"}
    for _ in range(3000):
        raw = mutate(gguf_file, 9000, rng)
        try:
            read_gguf(raw)
            seen.add("a model")
        except MiniCPMError as error:
            seen |= {stage for stage in stages if stage in str(error)}
    assert seen == stages | {"a model"}


@pytest.mark.slow
def test_a_minute_of_mutants(gguf_file: bytes, safetensors_file: bytes) -> None:
    rng = random.Random(2)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        survives(read_gguf, mutate(gguf_file, 9000, rng))
        survives(read_safetensors, mutate(safetensors_file, 2000, rng))
