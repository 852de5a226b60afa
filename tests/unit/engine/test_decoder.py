"""What `Decoder` accepts, refuses and reports."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import numpy as np
import pytest
from tests.reference import random_weights

from minicpm import _native
from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.engine.decoder import KERNEL_VARIABLE, Decoder
from minicpm.errors import EngineError
from minicpm.formats.weight import Weight


def weights_of(config: ModelConfig) -> dict[str, Weight]:
    return {name: Weight.from_array(array) for name, array in random_weights(config).items()}


@pytest.fixture
def decoder(tiny_config: ModelConfig) -> Decoder:
    return Decoder(tiny_config, weights_of(tiny_config), num_blocks=4, num_threads=2)


GOOD: dict[str, Any] = {
    "tokens": [1, 2, 3],
    "positions": [0, 1, 0],
    "sequences": [0, 0, 1],
    "block_tables": [[0, 1], [2, 3]],
    "output_rows": [1, 2],
}

BAD = {
    "a token outside the vocabulary": ({"tokens": [1, 331, 3]}, "token 331"),
    "a negative token": ({"tokens": [-1, 2, 3]}, "token -1"),
    "a position beyond the table": ({"positions": [63, 64, 0]}, "position 64"),
    "a negative position": ({"positions": [-1, 0, 0]}, "position -1"),
    "a gap between positions": ({"positions": [0, 2, 0]}, "consecutive"),
    "rows of a sequence apart": ({"sequences": [0, 1, 0]}, "stand together"),
    "a sequence without table": ({"sequences": [0, 0, 2]}, "sequence 2"),
    "a block that is not there": ({"block_tables": [[0, 1], [4, 3]]}, "block 4"),
    "a negative block": ({"block_tables": [[-1, 1], [2, 3]]}, "block -1"),
    "an output row that is not there": ({"output_rows": [3]}, "output row 3"),
    "a negative output row": ({"output_rows": [-1]}, "output row -1"),
    "different lengths": ({"tokens": [1, 2]}, "same length"),
    "a number beyond 32 bits": ({"tokens": [1, 2**32 + 1, 3]}, "32 bits"),
    "numbers that are not whole": ({"tokens": [1.5, 2, 3]}, "whole numbers"),
    "a table without a second axis": ({"block_tables": [0, 1]}, "2 axes"),
    "an unknown kind of output": ({"outputs": "embedding"}, "'logits' or 'hidden'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_steps_are_refused(decoder: Decoder, changes: dict[str, Any], message: str) -> None:
    assert decoder.step(**GOOD).shape == (2, 331)
    with pytest.raises(EngineError, match=message):
        decoder.step(**{**GOOD, **changes})
    assert np.isfinite(decoder.step(**GOOD)).all()


def test_a_step_without_rows_is_nothing(decoder: Decoder) -> None:
    none = np.array([], np.int32)
    assert decoder.step(none, none, none, np.zeros((0, 1), np.int32), none).shape == (0, 331)


BAD_SETTINGS = {
    "an unknown kernel": ({"kernel": "mmx"}, "kernel 'mmx'.*portable"),
    "no threads": ({"num_threads": 0}, "num_threads"),
    "no blocks": ({"num_blocks": 0}, "num_blocks"),
    "blocks of odd size": ({"block_tokens": 33}, "multiple of 32"),
    "an unknown KV type": ({"kv_type": "q4"}, "kv_type 'q4'.*q8"),
    "a cache beyond any memory": ({"num_blocks": 2**31 - 1, "block_tokens": 2**20}, "not enough memory"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused(tiny_config: ModelConfig, changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"num_blocks": 4, **changes}
    with pytest.raises(EngineError, match=message):
        Decoder(tiny_config, weights_of(tiny_config), **settings)


def test_missing_or_misshapen_weights_are_named(tiny_config: ModelConfig) -> None:
    weights = weights_of(tiny_config)
    name = "model.layers.3.mlp.up_proj.weight"
    with pytest.raises(EngineError, match=f"{name} is missing"):
        Decoder(tiny_config, {k: w for k, w in weights.items() if k != name}, num_blocks=4)
    with pytest.raises(EngineError, match=f"{name} has shape"):
        Decoder(tiny_config, {**weights, name: weights["model.embed_tokens.weight"]}, num_blocks=4)


def test_kernel_can_be_forced(tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _native.features()["kernels"]
    assert kernels[-1] == "portable"
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    assert Decoder(tiny_config, weights_of(tiny_config), num_blocks=4).kernel == kernels[0]
    monkeypatch.setenv(KERNEL_VARIABLE, "portable")
    assert Decoder(tiny_config, weights_of(tiny_config), num_blocks=4).kernel == "portable"


def test_memory_is_reported(decoder: Decoder, tiny_config: ModelConfig) -> None:
    assert decoder.cache_bytes == tiny_config.kv_cache_bytes(4 * 32, 4)  # float weights keep a float32 cache
    assert decoder.weight_bytes >= tiny_config.num_parameters().linear * 4


def test_not_a_number_is_not_rounded_away(tiny_config: ModelConfig) -> None:
    arrays = random_weights(tiny_config)
    arrays["model.embed_tokens.weight"][7, 5] = np.nan
    kinds = {name: "F32" if a.ndim == 1 or "embed" in name else "Q4_0" for name, a in arrays.items()}
    weights = {name: Weight.from_array(a, kinds[name]) for name, a in arrays.items()}
    for kernel in _native.features()["kernels"]:
        decoder = Decoder(tiny_config, weights, num_blocks=4, kernel=kernel)
        out = decoder.step([7, 8], [0, 0], [0, 1], [[0], [1]], [0, 1])
        assert np.isnan(out[0]).all()
        assert np.isnan(out[1]).sum() == 1  # only the logit of token 7, whose head row is spoilt


def test_dynamic_scaling_follows_the_length(tiny_config: ModelConfig) -> None:
    scaled = tiny_config.replace(rope_scaling=RopeScaling("dynamic", 2.0, 32))
    weights, ids, table = weights_of(tiny_config), np.arange(40) * 7 % 331, np.arange(4)[None]

    def run(config: ModelConfig, n: int, num_positions: int = 0) -> np.ndarray:
        decoder = Decoder(config, weights, num_blocks=4, num_positions=num_positions)
        return decoder.step(ids[:n], np.arange(n), np.zeros(n, int), table, [n - 1])

    assert np.array_equal(run(scaled, 32), run(tiny_config, 32))
    assert not np.allclose(run(scaled, 40), run(tiny_config, 40), atol=1e-2)
    assert np.array_equal(run(scaled, 40), run(scaled, 40, num_positions=40))
    assert not np.allclose(run(scaled, 32), run(scaled, 32, num_positions=64), atol=1e-2)


def test_control_c_ends_a_long_step() -> None:
    config = ModelConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=48, num_attention_heads=8, vocab_size=64
    )
    decoder = Decoder(config, weights_of(config), num_blocks=40, kernel="portable", num_threads=1)
    n = 1024
    out = np.full((1, 64), np.nan, np.float32)
    arrays = [np.zeros(n, np.int32), np.arange(n, dtype=np.int32), np.zeros(n, np.int32)]

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.06)
        with pytest.raises(KeyboardInterrupt):
            decoder._native.step(
                *arrays,
                np.arange(40, dtype=np.int32)[None],
                decoder._frequencies,
                np.array([n - 1], np.int32),
                True,
                out,
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # Had the step run to its end, its result would stand here.
    assert np.isnan(out).all()
    assert np.isfinite(decoder.step([1], [0], [0], [[0]], [0])).all()


def test_steps_of_several_threads_take_turns(decoder: Decoder) -> None:
    expected = decoder.step([5], [0], [0], [[0]], [0])
    wrong = []

    def work(block: int) -> None:
        for _ in range(50):
            if not np.array_equal(decoder.step([5], [0], [0], [[block]], [0]), expected):
                wrong.append(block)

    threads = [threading.Thread(target=work, args=(block,)) for block in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_can_step(decoder: Decoder) -> None:
    expected = decoder.step([5], [0], [0], [[0]], [0])
    child = os.fork()
    if child == 0:  # the pool's threads do not exist here
        same = np.array_equal(decoder.step([5], [0], [0], [[0]], [0]), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_bandwidth_probe() -> None:
    assert _native.read_bandwidth(1 << 24, 2, 2) > 1e8
    with pytest.raises(ValueError, match="at least 1"):
        _native.read_bandwidth(0, 1, 1)
