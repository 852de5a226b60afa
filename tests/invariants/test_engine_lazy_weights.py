"""What is repacked when changes no result: weights in the file, in memory, or some here and some there. Bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.reference import random_weights
from tests.unit.engine.tiny import tiny_tokenizer

import minicpm
from minicpm import _native
from minicpm.architecture import ModelConfig
from minicpm.engine import decoder as decoders
from minicpm.engine.decoder import Decoder
from minicpm.formats.checkpoint import Checkpoint, open_checkpoint
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry

KERNELS = _native.features()["kernels"]
IDS = np.random.default_rng(0).integers(0, 331, 40)


def write_file(path: Path, config: ModelConfig, block_type: str) -> Path:
    def entry(array: np.ndarray) -> WeightEntry:
        kind = block_type if array.ndim == 2 else "F32"
        return WeightEntry(array.shape, kind, lambda: Weight.from_array(array, kind))

    entries = {name: entry(array) for name, array in random_weights(config).items()}
    write_gguf_model(path, config, entries, tiny_tokenizer(config.vocab_size).to_gguf_metadata())
    return path


@pytest.fixture(params=[("F16", 16), ("Q4_0", 32), ("Q4_1", 64), ("Q8_0", 32)], ids=lambda p: f"{p[0]}-{p[1]}")
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, tiny_config: ModelConfig) -> Checkpoint:
    block_type, head_dim = request.param
    config = tiny_config.replace(head_dim=head_dim)
    return open_checkpoint(write_file(tmp_path / "tiny.gguf", config, block_type))


def run(decoder: Decoder) -> np.ndarray:
    at = np.arange(len(IDS))
    return decoder.step(IDS, at, at * 0, np.arange(2)[None], at[-3:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_state_between_file_and_memory_gives_the_same(
    checkpoint: Checkpoint, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = checkpoint.config, checkpoint.weights
    # A mapping of weights in HF order, without a file.
    expected = run(Decoder(config, dict(weights), num_blocks=2, num_threads=2, kernel=kernel))
    # Steps repack nothing here, so that each state is seen.
    monkeypatch.setattr(decoders, "_CATCH_UP_SECONDS", 0.0)
    decoder = Decoder(config, weights, num_blocks=2, num_threads=2, kernel=kernel, is_lazy=True)
    num_states = 0
    while True:
        assert np.array_equal(run(decoder), expected)
        if decoder.pack(0.0):
            break
        decoder.pack(1e-9)
        num_states += 1
    # Heads of this width are copied to reorder their queries and keys, and copies are repacked at once.
    assert num_states == (7 if config.head_dim % 32 == 0 else 5) * config.num_hidden_layers + 1


def test_the_steps_after_the_first_repack_the_rest(
    tmp_path: Path, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_file(tmp_path / "tiny.gguf", tiny_config, "Q4_0")
    # As if the tokenizer were there at once.
    monkeypatch.setattr(Decoder, "pack_until_called", lambda self: None)
    with minicpm.load(path) as model:
        decoder = model.engine._decoder
        assert isinstance(decoder, Decoder)
        assert decoder._held
        text = model.generate("hello", max_new_tokens=3, temperature=0.0)[0].text
        assert not decoder._held
        assert model.generate("hello", max_new_tokens=3, temperature=0.0)[0].text == text


def test_whoever_is_called_stops_after_one_matrix(checkpoint: Checkpoint) -> None:
    called, left_alone = (Decoder(checkpoint.config, checkpoint.weights, num_blocks=2, is_lazy=True) for _ in range(2))
    called.call()
    called.pack_until_called()
    left_alone.pack_until_called()
    assert called.weight_bytes < left_alone.weight_bytes
    assert np.array_equal(run(called), run(left_alone))
    assert called.pack()
    assert called.weight_bytes == left_alone.weight_bytes
