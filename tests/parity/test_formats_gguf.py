"""Against the package `gguf`: what it writes we read, what we write it reads, block types to the last bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.reference import random_weights
from tests.unit.formats.model_files import entries_of, vocabulary

from minicpm.architecture import ModelConfig
from minicpm.formats import blocks
from minicpm.formats.blocks import BLOCK_TYPES
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.gguf_read import open_gguf
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.names import HF_TO_GGUF

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")
ENCODED_THERE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def kind(name: str) -> Any:
    return getattr(gguf.GGMLQuantizationType, name)


def samples() -> np.ndarray:
    """Rows of every size and shape that weights come in, ties of rounding among them."""
    rng = np.random.default_rng(7)
    values = rng.standard_normal((96, 768)) * 10.0 ** rng.integers(-9, 3, (96, 1))
    values[1], values[2], values[3, :64] = 0, 0.25, -0.5
    values[4] = np.round(values[4] * 4) / 4
    values[5] = rng.integers(-127, 128, 768) / 2
    values[6, ::2] = 0
    values[7] = np.abs(values[7])
    values[8] = rng.standard_t(2, 768)
    return values.astype(np.float32)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_sizes_and_numbers(name: str) -> None:
    block_type = BLOCK_TYPES[name]
    assert block_type.ggml_id == kind(name).value
    assert gguf.GGML_QUANT_SIZES[kind(name)] == (block_type.block_size, block_type.block_bytes)


@pytest.mark.parametrize("name", ENCODED_THERE)
def test_encoding_to_the_last_bit(name: str) -> None:
    values = samples()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs divides by zero on the way
        theirs = np.ascontiguousarray(quants.quantize(values, kind(name))).view(np.uint8)
    assert np.array_equal(blocks.encode(name, values), theirs)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_decoding_to_the_last_bit(name: str) -> None:
    """On encoded weights, and on random bytes, which use every level, scale bit and sign."""
    random = np.random.default_rng(1).integers(0, 256, (64, 3 * BLOCK_TYPES[name].block_bytes), np.uint8)
    for data in (blocks.encode(name, samples()), random):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random scales are also infinite
            theirs = quants.dequantize(data, kind(name))
        ours = blocks.decode(name, data)
        is_nan = np.isnan(theirs)
        assert np.array_equal(is_nan, np.isnan(ours))
        assert np.array_equal(ours.view(np.uint32)[~is_nan], theirs.view(np.uint32)[~is_nan])


def test_it_reads_our_files(tmp_path: Path, tiny_config: ModelConfig) -> None:
    weights = random_weights(tiny_config)
    types = list(BLOCK_TYPES)[3:8]
    entries = entries_of(weights, lambda name: types[len(name) % len(types)])
    write_gguf_model(tmp_path / "a.gguf", tiny_config, entries, vocabulary(331))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    ours = open_gguf(tmp_path / "a.gguf")
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(fields) == list(ours.metadata)
    for key, field in fields.items():
        assert field.contents() == ours.metadata[key], key
    as_expected = {
        "tokenizer.ggml.token_type": "INT32",
        "tokenizer.ggml.scores": "FLOAT32",
        "minicpm.block_count": "UINT32",
    }
    for key, expected in as_expected.items():
        assert fields[key].types[-1].name == expected
    assert len(reader.tensors) == len(weights)
    for tensor in reader.tensors:
        weight = ours.weight(tensor.name)
        assert tuple(reversed(tensor.shape.tolist())) == weight.shape
        assert tensor.tensor_type.name == weight.block_type
        assert np.array_equal(np.ascontiguousarray(tensor.data).view(np.uint8).reshape(weight.data.shape), weight.data)


def test_we_read_its_files(tmp_path: Path, tiny_config: ModelConfig) -> None:
    """Written by its own helper functions, so that the names of keys are its own too."""
    config = tiny_config.replace(torch_dtype="float32")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "minicpm")
    writer.add_context_length(512)
    writer.add_embedding_length(96)
    writer.add_block_count(5)
    writer.add_feed_forward_length(160)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_embedding_scale(12.0)
    writer.add_residual_scale(1.4 / 5**0.5)
    writer.add_logit_scale(4.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list(vocabulary(331)["tokenizer.ggml.tokens"])
    weights = random_weights(config)
    for name, array in weights.items():
        layer = name.split(".")[2] if ".layers." in name else ""
        theirs = HF_TO_GGUF[name.replace(f".{layer}.", ".{}.")].format(layer) if layer else HF_TO_GGUF[name]
        heads = {"q_proj": 6, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # the official converter's permutation
            array = array.reshape(heads, 2, 8, 96).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert checkpoint.config == config
    for name, array in weights.items():
        assert np.array_equal(checkpoint.weights[name].decode(), array), name


def test_the_default_model(smollm2_path: Path) -> None:
    reader, ours = gguf.GGUFReader(smollm2_path), open_gguf(smollm2_path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: field.contents() for key, field in fields.items()} == dict(ours.metadata)
    places = {t.name: (t.data_offset, t.n_bytes, t.tensor_type.name) for t in reader.tensors}
    assert {name: (i.offset, i.num_bytes, i.block_type) for name, i in ours.tensors.items()} == places
    checkpoint = open_checkpoint(smollm2_path)
    assert checkpoint.dtype_summary == "Q4_1 (210), F32 (61), Q8_0 (1)"
    assert checkpoint.config.num_parameters().total == 134_515_008
