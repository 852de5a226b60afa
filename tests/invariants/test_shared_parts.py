"""Parts of blocks that are copied instead of computed change nothing, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from tests.reference import random_weights
from tests.unit.engine.tiny import complete

from minicpm.architecture import ModelConfig
from minicpm.engine import Engine, Limits, Request, Sampler, Sequence
from minicpm.engine.decoder import Decoder
from minicpm.formats.weight import Weight

NUM_BLOCKS = 24


def make_engine(config: ModelConfig, kv_type: str, *, copies: bool, num_blocks: int = NUM_BLOCKS) -> Engine:
    arrays = random_weights(config)
    weights = {n: Weight.from_array(a, "Q8_0" if a.ndim == 2 else "F32") for n, a in arrays.items()}
    decoder = Decoder(config, weights, num_threads=2, num_blocks=num_blocks, kv_type=kv_type)
    limits = Limits(max_parallel=8, max_step_tokens=100, max_mixed_tokens=40, max_output_rows=30)
    engine = Engine(decoder, config, num_blocks=num_blocks, context_length=150, limits=limits)
    if not copies:
        engine._scheduler._copy_block = None
    return engine


def requests() -> list[Request]:
    """Endings of contexts that end anywhere in a block, and replies to prompts that begin alike."""
    generator = np.random.default_rng(5)

    def ids(length: int) -> list[int]:
        return generator.integers(0, 331, length).tolist()

    wanted = []
    for length in (6, 29, 33, 61, 64, 90):
        context = ids(length)
        wanted += [
            Request([*context, *ids(n)], max_new_tokens=0, prompt_logprobs=2, first_scored=length) for n in (5, 1, 40)
        ]
        wanted += [Request([*context, *ids(n)], Sampler(temperature=0), 45, logprobs=2) for n in (3, 20)]
    return wanted


def records(sequences: list[Sequence]) -> list[object]:
    return [(s.prompt_logprobs, s.logprobs, s.new_ids, s.finish_reason) for s in sequences]


@pytest.mark.parametrize("kv_type", ["f16", "bf16", "f32", "q8"])
def test_copied_parts_change_no_bit(tiny_config: ModelConfig, kv_type: str) -> None:
    plain = make_engine(tiny_config, kv_type, copies=False)
    alone = [complete(plain, request)[0] for request in requests()]
    copying = make_engine(tiny_config, kv_type, copies=True)
    together = complete(copying, *requests())
    assert records(together) == records(alone)
    assert sum(s.num_cached_tokens for s in together) > 1.4 * sum(s.num_cached_tokens for s in alone)
    # What is found is not computed: every token is one or the other, but the last, of which nothing is wanted.
    num_tokens = sum(len(s.token_ids) - 1 for s in together)
    num_computed = copying.load.num_computed_tokens - copying.load.num_drafted_tokens
    num_computed += copying.load.num_accepted_tokens
    assert num_computed + sum(s.num_cached_tokens for s in together) == num_tokens
    assert records(complete(copying, *requests())) == records(alone)
    assert copying.load.num_held_blocks == 0


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
def test_nor_do_they_when_blocks_run_out(tiny_config: ModelConfig, kv_type: str) -> None:
    roomy = make_engine(tiny_config, kv_type, copies=False)
    tight = make_engine(tiny_config, kv_type, copies=True, num_blocks=6)
    together = complete(tight, *requests())
    assert tight.load.num_preemptions > 0
    assert records(together) == records([complete(roomy, request)[0] for request in requests()])
    assert sum(s.num_cached_tokens for s in together) > 0
    assert tight.load.num_held_blocks == 0
