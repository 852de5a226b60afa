"""Every kernel that this machine has, on every block type and family, against float32 numpy on the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.reference import ReferenceDecoder, divergence, log_softmax, random_weights

from minicpm import _native
from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.engine.decoder import Decoder
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.weight import Weight

KERNELS = _native.features()["kernels"]
FLOAT_TYPES = ("F32", "F16", "BF16")
QUANTIZED_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
NUM_BLOCKS = 8


def encode(config: ModelConfig, block_type: str, seed: int = 0) -> dict[str, Weight]:
    """Random weights, all matrices in one block type."""
    return {
        name: Weight.from_array(array, block_type if array.ndim == 2 else "F32")
        for name, array in random_weights(config, seed).items()
    }


def fitting(config: ModelConfig, block_type: str) -> ModelConfig:
    """The configuration with sizes that are whole blocks of `block_type`."""
    if not block_type.endswith("_K"):
        return config
    return config.replace(
        hidden_size=256, intermediate_size=512, head_dim=64, num_attention_heads=4, num_key_value_heads=2
    )


def logprobs(decoder: Decoder, ids: list[int]) -> np.ndarray:
    """Log-probabilities (T, V) after each of `ids`, in one step."""
    n = len(ids)
    table = np.arange(NUM_BLOCKS)[None]
    return log_softmax(decoder.step(np.array(ids), np.arange(n), np.zeros(n, int), table, np.arange(n)))


def some_ids(config: ModelConfig, count: int = 150) -> list[int]:
    """Enough ids for more than one chunk of attention and several cache blocks."""
    return np.random.default_rng(3).integers(0, config.vocab_size, count).tolist()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block_type", FLOAT_TYPES)
def test_float_weights(tiny_config: ModelConfig, kernel: str, block_type: str) -> None:
    weights, ids = encode(tiny_config, block_type), some_ids(tiny_config)
    truth = log_softmax(ReferenceDecoder(tiny_config, weights).full_logits(ids))
    ours = logprobs(Decoder(tiny_config, weights, num_blocks=NUM_BLOCKS, kernel=kernel), ids)
    # Measured 1.1e-4 over 150 × 331 logprobs as low as -7; this model's scores are far sharper than a trained one's.
    np.testing.assert_allclose(ours, truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block_type", QUANTIZED_TYPES)
def test_quantized_weights(tiny_config: ModelConfig, kernel: str, block_type: str) -> None:
    config = fitting(tiny_config, block_type)
    weights, ids = encode(config, block_type), some_ids(config)
    truth = log_softmax(ReferenceDecoder(config, weights).full_logits(ids))
    decoder = Decoder(config, weights, num_blocks=NUM_BLOCKS, kernel=kernel, kv_type="f32")
    # Measured 3e-3: activations rounded to 16 bits; the portable kernel, which does not round them, reaches 1e-4.
    np.testing.assert_allclose(logprobs(decoder, ids), truth, rtol=0, atol=1e-3 if kernel == "portable" else 1e-2)


@pytest.mark.parametrize(("kv_type", "bound"), [("f16", 1e-5), ("bf16", 1e-3), ("q8", 1e-3)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kv_types(tiny_config: ModelConfig, kernel: str, kv_type: str, bound: float) -> None:
    weights, ids = encode(tiny_config, "Q4_0"), some_ids(tiny_config)
    truth = ReferenceDecoder(tiny_config, weights).full_logits(ids)
    decoder = Decoder(tiny_config, weights, num_blocks=NUM_BLOCKS, kernel=kernel, kv_type=kv_type)
    ours = logprobs(decoder, ids)
    mean = np.mean([divergence(*pair) for pair in zip(truth, ours, strict=True)])
    # Measured 1.2e-6 for f16.
    assert mean < bound


FAMILIES = {
    "llama": {"model_type": "llama", "scale_emb": 1.0, "scale_depth": 5**0.5, "dim_model_base": 96.0},
    "granite": {"model_type": "granite", "attention_multiplier": 0.11},
    "untied": {"tie_word_embeddings": False},
    "every head its own": {"num_key_value_heads": 6},
    "odd sizes": {"head_dim": 10, "vocab_size": 333, "intermediate_size": 150, "hidden_size": 90},
    "linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "llama3": {"rope_scaling": RopeScaling("llama3", 8.0, 64, 1.0, 4.0)},
    "ntk_by_parts": {"rope_scaling": RopeScaling("ntk_by_parts", 4.0, 64)},
    "dynamic": {"rope_scaling": RopeScaling("dynamic", 2.0, 64)},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_families(tiny_config: ModelConfig, kernel: str, changes: dict[str, object]) -> None:
    config = tiny_config.replace(**changes)
    weights, ids = encode(config, "F16"), some_ids(config)
    truth = log_softmax(ReferenceDecoder(config, weights, num_positions=len(ids)).full_logits(ids))
    ours = logprobs(Decoder(config, weights, num_blocks=NUM_BLOCKS, kernel=kernel), ids)
    np.testing.assert_allclose(ours, truth, rtol=0, atol=1e-3)


def test_block_types_may_be_mixed(tiny_config: ModelConfig) -> None:
    types = ["Q4_1", "F32", "Q8_0", "BF16", "Q4_0", "F16", "Q5_1"]
    weights = {}
    for i, (name, array) in enumerate(random_weights(tiny_config).items()):
        weights[name] = Weight.from_array(array, types[i % len(types)] if array.ndim == 2 else "F32")
    ids = some_ids(tiny_config)
    truth = log_softmax(ReferenceDecoder(tiny_config, weights).full_logits(ids))
    for kernel in KERNELS:
        ours = logprobs(Decoder(tiny_config, weights, num_blocks=NUM_BLOCKS, kernel=kernel, kv_type="f32"), ids)
        np.testing.assert_allclose(ours, truth, rtol=0, atol=1e-2)


def test_hidden_states(tiny_config: ModelConfig) -> None:
    weights, ids = encode(tiny_config, "F32"), some_ids(tiny_config, 40)
    truth = ReferenceDecoder(tiny_config, weights).full_hidden(ids)
    n = len(ids)
    decoder = Decoder(tiny_config, weights, num_blocks=NUM_BLOCKS)
    ours = decoder.step(
        np.array(ids), np.arange(n), np.zeros(n, int), np.arange(NUM_BLOCKS)[None], np.array([39, 0, 39]), "hidden"
    )
    np.testing.assert_allclose(ours, truth[[39, 0, 39]], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_default_model_is_true(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    reference = ReferenceDecoder(checkpoint.config, checkpoint.weights)
    decoder = Decoder(checkpoint.config, checkpoint.weights, num_blocks=16)
    generator = np.random.default_rng(0)
    found = []
    for length in (5, 17, 40, 90, 200):
        ids = generator.integers(0, checkpoint.config.vocab_size, length)
        truth = reference.full_logits(ids.tolist(), last_only=True)[0]
        ours = decoder.step(ids, np.arange(length), np.zeros(length, int), np.arange(16)[None], np.array([length - 1]))
        found.append(divergence(truth, ours[0]))
    # Measured 3e-6 on prompts of text, all of it the cache's half precision; llama.cpp shows 4.6e-3.
    assert np.mean(found) < 5e-5
