"""The engine's results do not depend on how work is cut: threads, batches, chunks, cache blocks. Bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from tests.reference import random_weights

from minicpm import _native
from minicpm.architecture import ModelConfig
from minicpm.engine.decoder import Decoder
from minicpm.formats.weight import Weight

KERNELS = _native.features()["kernels"]
NUM_BLOCKS = 64
MAX_BLOCKS = 8


@dataclass
class Setting:
    """What the tests of one kernel and block type share."""

    config: ModelConfig
    weights: dict[str, Weight]
    kernel: str
    kv_type: str | None

    def decoder(self, num_threads: int = 2, block_tokens: int = 32) -> Decoder:
        return Decoder(
            self.config,
            self.weights,
            num_threads=num_threads,
            num_blocks=NUM_BLOCKS,
            block_tokens=block_tokens,
            kernel=self.kernel,
            kv_type=self.kv_type,
        )

    def ids(self, count: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, self.config.vocab_size, count)


@pytest.fixture(params=[(k, t) for k in KERNELS for t in ("F16", "Q4_0", "Q8_0")], ids=lambda p: "-".join(p))
def setting(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> Setting:
    kernel, block_type = request.param
    weights = {
        name: Weight.from_array(array, block_type if array.ndim == 2 else "F32")
        for name, array in random_weights(tiny_config).items()
    }
    return Setting(tiny_config, weights, kernel, "q8" if block_type == "Q8_0" else None)


def run(decoder: Decoder, ids: np.ndarray, start: int = 0, table: np.ndarray | None = None) -> np.ndarray:
    """Logits (T, V) of one sequence's next rows, in one step."""
    n = len(ids)
    tables = np.arange(MAX_BLOCKS)[None] if table is None else table[None]
    return decoder.step(ids, np.arange(start, start + n), np.zeros(n, int), tables, np.arange(n))


def test_threads_change_nothing(setting: Setting) -> None:
    ids = setting.ids(150)
    whole = [run(setting.decoder(threads), ids) for threads in (1, 2, 3)]
    assert np.array_equal(whole[0], whole[1])
    assert np.array_equal(whole[0], whole[2])
    # A decode step of a long sequence spreads the chunks of its attention over the threads.
    single = []
    for threads in (1, 2, 3):
        decoder = setting.decoder(threads)
        run(decoder, ids[:-1])
        single.append(run(decoder, ids[-1:], len(ids) - 1))
    assert np.array_equal(single[0], single[1])
    assert np.array_equal(single[0], single[2])
    assert np.array_equal(single[0][0], whole[0][-1])


def test_chunked_prefill_and_cached_decode_equal_one_prefill(setting: Setting) -> None:
    ids = setting.ids(150)
    whole = run(setting.decoder(), ids)
    decoder = setting.decoder()
    pieces, start = [], 0
    for size in (1, 7, 60, 2, 33, 40, 1, 1, 5):
        pieces.append(run(decoder, ids[start : start + size], start))
        start += size
    assert start == len(ids)
    assert np.array_equal(np.concatenate(pieces), whole)


def test_ragged_batch_equals_each_alone(setting: Setting) -> None:
    lengths = (1, 2, 31, 32, 33, 70, 129, 140)
    prompts = [setting.ids(n + 1, seed) for seed, n in enumerate(lengths)]
    tables = np.random.default_rng(5).permutation(NUM_BLOCKS)[: 8 * MAX_BLOCKS].reshape(8, MAX_BLOCKS)
    batch = setting.decoder()
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    rows = np.concatenate([prompts[s][:-1] for s in order])
    positions = np.concatenate([np.arange(lengths[s]) for s in order])
    sequences = np.concatenate([np.full(lengths[s], s) for s in order])
    last = np.cumsum([lengths[s] for s in order]) - 1
    prefill = batch.step(rows, positions, sequences, tables, last)
    decode = batch.step(
        np.array([prompt[-1] for prompt in prompts]), np.array(lengths), np.arange(8), tables, np.arange(8)
    )
    for at, sequence in enumerate(order):
        alone = setting.decoder()
        ids = prompts[sequence]
        assert np.array_equal(run(alone, ids[:-1])[-1], prefill[at])
        assert np.array_equal(run(alone, ids[-1:], lengths[sequence])[0], decode[sequence])


def test_size_of_cache_blocks_changes_nothing(setting: Setting) -> None:
    ids = setting.ids(150)
    whole = run(setting.decoder(), ids)
    assert np.array_equal(whole, run(setting.decoder(block_tokens=64), ids))
    assert np.array_equal(whole, run(setting.decoder(block_tokens=256), ids))


def test_shared_prefix_is_read_by_both(setting: Setting) -> None:
    prefix, ends = setting.ids(64), [setting.ids(9, 1), setting.ids(9, 2)]
    decoder = setting.decoder()
    run(decoder, prefix)
    tables = np.array([[0, 1, 2, 3], [0, 1, 4, 5]])
    rows = np.concatenate(ends)
    positions = np.tile(np.arange(64, 73), 2)
    both = decoder.step(rows, positions, np.repeat([0, 1], 9), tables, np.arange(18))
    for i, end in enumerate(ends):
        alone = run(setting.decoder(), np.concatenate([prefix, end]))
        assert np.array_equal(alone[64:], both[9 * i : 9 * i + 9])


def test_output_rows_may_be_any(setting: Setting) -> None:
    ids = setting.ids(40)
    whole = run(setting.decoder(), ids)
    wanted = np.array([39, 3, 3, 0, *range(40), 17])
    some = setting.decoder().step(ids, np.arange(40), np.zeros(40, int), np.arange(MAX_BLOCKS)[None], wanted)
    assert np.array_equal(some, whole[wanted])
    decoder = setting.decoder()
    none = decoder.step(ids, np.arange(40), np.zeros(40, int), np.arange(MAX_BLOCKS)[None], np.array([], int))
    assert none.shape == (0, setting.config.vocab_size)
    assert np.array_equal(run(decoder, ids[-1:], 39)[0], whole[-1])  # keys and values were stored all the same
