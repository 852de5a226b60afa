"""Company, cutting and caching change nothing: a batch of eight is eight times one, over the real kernels too.

Logprobs agree within 0.01 nats, greedy tokens up to the first position whose two best are closer than that.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.reference import ReferenceDecoder, random_weights
from tests.unit.engine.tiny import complete, run_all

from minicpm.architecture import ModelConfig
from minicpm.engine import Engine, Limits, Request, Sampler, Sequence
from minicpm.engine.decoder import Decoder
from minicpm.formats.weight import Weight

TOLERANCE = 0.01
LENGTHS = (1, 3, 31, 32, 33, 64, 90, 150)
NEW_TOKENS = 12
MakeEngine = Callable[..., Engine]


@pytest.fixture(params=["reference", "F32", "Q8_0", "Q4_1"])
def make_engine(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> MakeEngine:
    """Engines over one model: the reference on its weights, or the real kernels on them in a block type."""
    arrays = random_weights(tiny_config)

    def make(num_blocks: int = 64, context_length: int | None = None, **limits: int) -> Engine:
        if request.param == "reference":
            decoder: Any = ReferenceDecoder(tiny_config, arrays, num_blocks=num_blocks)
        else:
            weights = {n: Weight.from_array(a, request.param if a.ndim == 2 else "F32") for n, a in arrays.items()}
            decoder = Decoder(tiny_config, weights, num_threads=2, num_blocks=num_blocks)
        options = {"num_blocks": num_blocks, "context_length": context_length}
        return Engine(decoder, tiny_config, limits=Limits(**limits), **options)

    return make


def requests(sampler: Sampler | None = None, **options: Any) -> list[Request]:
    """Eight ragged prompts."""
    generator = np.random.default_rng(7)
    sampler = sampler or Sampler(temperature=0)
    return [
        Request(generator.integers(0, 331, length).tolist(), sampler, NEW_TOKENS, logprobs=2, **options)
        for length in LENGTHS
    ]


def alone(engine: Engine, wanted: list[Request]) -> list[Sequence]:
    return [complete(engine, request)[0] for request in wanted]


def assert_same(found: list[Sequence], expected: list[Sequence]) -> None:
    """Each pair agrees as the head of this file says; most of it must have been compared."""
    num_compared = 0
    for one, other in zip(found, expected, strict=True):
        assert one.finish_reason == other.finish_reason
        for mine, theirs in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert mine.token_id == theirs.token_id
            assert mine.logprob == pytest.approx(theirs.logprob, abs=TOLERANCE)
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            gap = theirs.top[0].logprob - theirs.top[1].logprob
            if gap < TOLERANCE and mine.token_id != theirs.token_id:
                break
            assert mine.token_id == theirs.token_id
            assert mine.logprob == pytest.approx(theirs.logprob, abs=TOLERANCE)
            num_compared += 1
    assert num_compared >= 0.6 * len(expected) * NEW_TOKENS


def test_a_batch_of_eight_is_eight_times_one(make_engine: MakeEngine) -> None:
    engine = make_engine(max_parallel=8)
    assert_same(complete(engine, *requests()), alone(make_engine(), requests()))
    assert engine.load.num_steps < len(LENGTHS) * NEW_TOKENS


def test_prompts_in_small_chunks_are_prompts_in_one(make_engine: MakeEngine) -> None:
    scored = requests(prompt_logprobs=0)
    whole = alone(make_engine(max_step_tokens=512), scored)
    assert_same(complete(make_engine(max_step_tokens=13, max_mixed_tokens=5, max_output_rows=4), *scored), whole)


def test_preemption_changes_nothing(make_engine: MakeEngine) -> None:
    tight = make_engine(num_blocks=6, context_length=180, max_parallel=8)
    found = complete(tight, *requests())
    assert tight.load.num_preemptions > 0
    assert_same(found, alone(make_engine(), requests()))
    assert tight.load.num_held_blocks == 0


def test_a_prefix_from_the_cache_is_as_good_as_one_computed(make_engine: MakeEngine) -> None:
    engine = make_engine()
    first = alone(engine, requests())
    again = alone(engine, requests())
    assert [s.num_cached_tokens for s in again] == [0, 0, 30, 31, 32, 63, 89, 149]
    assert_same(again, first)
    assert_same(complete(engine, *requests()), first)


def test_equal_prompts_at_once_share_one_computation(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = requests()[-1]
    together = complete(engine, *[request] * 4)
    assert [s.num_cached_tokens for s in together] == [0, 149, 149, 149]
    assert_same(together, alone(make_engine(), [request] * 4))


def test_a_seed_gives_the_same_text_in_any_company(make_engine: MakeEngine) -> None:
    sampler = Sampler(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.1, seed=11)
    expected = [s.new_ids for s in alone(make_engine(), requests(sampler))]
    found = [s.new_ids for s in complete(make_engine(max_parallel=3), *requests(sampler))]
    # A draw that falls on the edge between two tokens may go either way; that it happens twice in eight is unlikely.
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 7


def test_drafts_change_no_token(make_engine: MakeEngine) -> None:
    plain = alone(make_engine(), requests(speculate="off"))
    engine = make_engine()
    # Every row is worth computing to this clock.
    engine._speculator.times.predict = lambda num_rows: num_rows**-2.0
    assert_same(complete(engine, *requests()), plain)
    assert engine.load.num_drafted_tokens > 0


def test_arrivals_and_cancellations_in_between_change_nothing(make_engine: MakeEngine) -> None:
    engine, kept = make_engine(max_parallel=3, max_step_tokens=40), []
    generator = np.random.default_rng(3)
    for request in requests():
        disturbing = engine.add(Request(generator.integers(0, 331, 50).tolist(), Sampler(seed=1)))
        kept.append(engine.add(request))
        for _ in range(3):
            engine.step()
        engine.cancel(disturbing)
    list(run_all(engine))
    assert_same(kept, alone(make_engine(), requests()))
    assert engine.load.num_held_blocks == 0


def test_a_thousand_requests_leave_memory_flat(tiny_config: ModelConfig) -> None:
    weights = {name: Weight.from_array(array) for name, array in random_weights(tiny_config).items()}
    decoder = Decoder(tiny_config, weights, num_threads=1, num_blocks=32)
    engine = Engine(decoder, tiny_config, num_blocks=32, limits=Limits(max_parallel=8))
    generator = np.random.default_rng(5)
    kinds: list[dict[str, Any]] = [{}, {"prompt_logprobs": 3}, {"wants_distribution": True}, {"pooling": "mean"}]

    def serve(count: int) -> None:
        for number in range(count):
            prompt = generator.integers(0, 331, int(generator.integers(1, 60))).tolist()
            kind = kinds[number % len(kinds)]
            limit = 0 if "pooling" in kind else 3
            sequence = engine.add(Request(prompt, Sampler(presence_penalty=0.1), limit, **kind))
            if number % 5 == 0:
                engine.step()
                engine.cancel(sequence)
            elif number % 8 == 7:
                list(run_all(engine))
        list(run_all(engine))

    serve(300)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    serve(1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096
    assert engine.load.num_held_blocks == 0
    assert engine.load.num_running == engine.load.num_waiting == 0
