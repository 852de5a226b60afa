"""Drafts change the pace and nothing else; their length follows the clock."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import random_weights
from tests.unit.engine.tiny import complete, reference_engine, run_all, tiny_tokenizer

from minicpm.architecture import ModelConfig
from minicpm.engine import Engine, Limits, Request, Sampler, Sequence
from minicpm.engine.decoder import Decoder
from minicpm.engine.scheduler import Chunk
from minicpm.engine.speculation import Proposal, Speculator, allot
from minicpm.engine.speculation_ngram import LEAST_CHANCE, LONGEST_MATCH, Lookup, Trust
from minicpm.engine.speculation_times import StepTimes
from minicpm.errors import EngineError
from minicpm.formats.weight import Weight

GREEDY = Sampler(temperature=0)


def times_of(**seconds: float) -> StepTimes:
    """Times of sizes, as in `times_of(n1=1.0, n8=1.7)`."""
    times = StepTimes()
    for name, value in seconds.items():
        times.observe(int(name[1:]), value)
    return times


class Clock(StepTimes):
    """A machine for which a row more costs a tenth of a step."""

    def predict(self, num_rows: int) -> float | None:
        return 0.9 + 0.1 * num_rows


class Guesser(Speculator):
    """Drafts up to nine tokens of the replies that will come, and gets some wrong on purpose."""

    def __init__(self, replies: dict[int, list[int]], seed: int = 0) -> None:
        super().__init__(max_rows=512)
        self._replies = replies
        self._random = np.random.default_rng(seed)

    def draft(self, chunks: Items[Chunk], opened: Any = None) -> list[Chunk]:
        return [Chunk(c.sequence, c.num_tokens, self._guess(c)) for c in chunks]

    def _guess(self, chunk: Chunk) -> tuple[int, ...]:
        sequence = chunk.sequence
        if chunk.num_tokens != 1 or sequence.num_pending != 1:
            return ()
        done = len(sequence.new_ids)
        reply = self._replies[sequence.request.prompt[0]][done : done + int(self._random.integers(0, 10))]
        wrong = self._random.random(len(reply)) < 0.15
        return tuple(int(t) ^ int(w) for t, w in zip(reply[: sequence.num_left - 1], wrong, strict=False))


def prompts(*lengths: int) -> list[list[int]]:
    """Prompts that differ in their first token."""
    generator = np.random.default_rng(3)
    return [[10 + i, *generator.integers(0, 331, n - 1).tolist()] for i, n in enumerate(lengths)]


def exact_engine(config: ModelConfig, *, num_blocks: int = 64, **options: Any) -> Engine:
    """An engine whose rows do not depend on the rows beside them, to the last bit."""
    weights = {name: Weight.from_array(array) for name, array in random_weights(config).items()}
    decoder = Decoder(config, weights, num_threads=1, num_blocks=num_blocks, kernel="portable")
    return Engine(decoder, config, num_blocks=num_blocks, tokenizer=tiny_tokenizer(), **options)


def with_and_without(
    config: ModelConfig, requests: list[Request], seed: int = 0, **options: Any
) -> tuple[list[Sequence], list[Sequence], Engine]:
    """The sequences of `requests` with guessed drafts, those without any, and the engine of the former."""
    engine = exact_engine(config, **options)
    without = complete(engine, *(replace(request, speculate="off") for request in requests))
    assert engine.load.num_drafted_tokens == 0
    engine = exact_engine(config, **options)
    engine._speculator = Guesser({s.request.prompt[0]: s.new_ids for s in without}, seed)
    return complete(engine, *requests), without, engine


def assert_same(found: list[Sequence], expected: list[Sequence]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.new_ids, one.text, one.finish_reason) == (other.new_ids, other.text, other.finish_reason)
        assert one.logprobs == other.logprobs


SAMPLERS = {
    "greedy": GREEDY,
    "plain": Sampler(seed=5),
    "cut": Sampler(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, seed=6),
    "penalties": Sampler(temperature=0.5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, seed=7),
    "bias": Sampler(temperature=1.5, logit_bias={40: 3.0, 41: -20.0}, seed=8),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_replies_with_drafts_are_those_without(tiny_config: ModelConfig, sampler: Sampler) -> None:
    wanted = [Request(p, sampler, max_new_tokens=60, logprobs=2) for p in prompts(5, 40, 70)]
    found, expected, engine = with_and_without(tiny_config, wanted)
    assert_same(found, expected)
    load = engine.load
    assert 0 < load.num_accepted_tokens < load.num_drafted_tokens
    assert load.num_steps < 45
    assert load.num_held_blocks == 0
    assert sum(s.num_drafted_tokens for s in found) == load.num_drafted_tokens
    assert sum(s.num_accepted_tokens for s in found) == load.num_accepted_tokens


@pytest.mark.parametrize("seed", range(4))
def test_a_reply_ends_at_the_same_token_in_the_middle_of_a_draft(tiny_config: ModelConfig, seed: int) -> None:
    (free,), _, _ = with_and_without(tiny_config, [Request(prompts(5)[0], Sampler(seed=1), max_new_tokens=60)])
    stop, end_id = free.text[20:23], free.new_ids[33]
    endings: list[dict[str, Any]] = [{"stop": [stop]}, {"end_ids": {end_id}}, {"max_new_tokens": 7}]
    for ending in endings:
        request = Request(prompts(5)[0], Sampler(seed=1), **{"max_new_tokens": 60, **ending})
        (found,), (expected,), engine = with_and_without(tiny_config, [request], seed)
        assert_same([found], [expected])
        assert (engine.load.num_held_blocks, engine.has_work) == (0, False)


def test_when_blocks_run_out_drafts_make_way(tiny_config: ModelConfig) -> None:
    wanted = [Request(p, GREEDY, max_new_tokens=50) for p in prompts(30, 31, 60)]
    found, expected, engine = with_and_without(tiny_config, wanted, num_blocks=6, context_length=120)
    assert_same(found, expected)
    assert engine.load.num_preemptions > 0
    assert engine.load.num_accepted_tokens > 0
    assert engine.load.num_held_blocks == 0


def test_drafts_fill_the_context_to_its_last_position(tiny_config: ModelConfig) -> None:
    wanted = [Request(prompts(40)[0], GREEDY)]
    found, expected, _ = with_and_without(tiny_config, wanted, num_blocks=2, context_length=64)
    assert_same(found, expected)
    assert len(found[0].token_ids) == 64


def test_only_accepted_tokens_are_found_by_others(tiny_config: ModelConfig) -> None:
    (first,), _, engine = with_and_without(tiny_config, [Request(prompts(20)[0], GREEDY, max_new_tokens=80)])
    assert engine.load.num_accepted_tokens < engine.load.num_drafted_tokens
    (second,) = complete(engine, Request([*first.token_ids, 7], GREEDY, max_new_tokens=1, logprobs=0))
    assert second.num_cached_tokens == 96
    (truth,) = complete(exact_engine(tiny_config), Request([*first.token_ids, 7], GREEDY, max_new_tokens=1, logprobs=0))
    assert_same([second], [truth])


def test_blocks_of_refused_drafts_are_given_back(tiny_config: ModelConfig) -> None:
    engine, _ = reference_engine(tiny_config)
    sequence = engine.add(Request(prompts(31)[0], GREEDY, max_new_tokens=40))

    def draft(chunks: Items[Chunk], opened: Any) -> list[Chunk]:
        is_generating = chunks[0].num_tokens == 1
        return [Chunk(sequence, chunks[0].num_tokens, [330] * 9 if is_generating else ())]

    engine._speculator.draft = draft
    engine.step()
    engine.step()
    assert (sequence.num_drafted_tokens, sequence.num_accepted_tokens) == (9, 0)
    assert len(sequence.token_ids) == 33
    assert engine.load.num_held_blocks == len(sequence.blocks) == 2
    assert sequence.num_tabled <= 2


def test_cancelling_between_draft_and_step(tiny_config: ModelConfig) -> None:
    engine, _ = reference_engine(tiny_config)
    one, other = (engine.add(Request(p, GREEDY, max_new_tokens=4)) for p in prompts(5, 6))
    engine.step()
    draft = engine._speculator.draft

    def cancelling(chunks: Items[Chunk], opened: Any) -> list[Chunk]:
        engine.cancel(one)
        return draft(chunks)

    engine._speculator.draft = cancelling
    events = list(run_all(engine))
    assert {event.sequence for event in events} == {other}
    assert len(other.new_ids) == 4
    assert engine.load.num_held_blocks == 0


def test_prompt_scores_of_a_single_token_beside_drafts(tiny_config: ModelConfig) -> None:
    wanted = [Request(prompts(1)[0], GREEDY, max_new_tokens=30, prompt_logprobs=0, logprobs=1)]
    found, expected, _ = with_and_without(tiny_config, wanted)
    assert_same(found, expected)
    assert found[0].num_read == 1


def test_text_that_repeats_is_drafted_from_itself(tiny_config: ModelConfig) -> None:
    engine, _ = reference_engine(tiny_config, limits=Limits(max_parallel=2))
    engine._speculator.times = Clock()
    prompt = [5, 6, 7, 8, 9] * 9
    bias = Sampler(temperature=0, logit_bias={5: 30.0})
    (sequence,) = complete(engine, Request(prompt, bias, max_new_tokens=60))
    assert sequence.new_ids == [5] * 60
    assert sequence.num_accepted_tokens > 40
    assert engine.load.num_steps < 20


def test_an_unknown_source_of_drafts_is_refused() -> None:
    with pytest.raises(EngineError, match="speculate must be one of ngram, draft, off, got 'magic'"):
        Request([1], speculate="magic")


# ---------------------------------------------------------------------- how long a draft pays


def test_times_between_known_sizes_lie_on_a_line() -> None:
    times = times_of(n1=1.0, n5=3.0, n9=11.0)
    assert [times.predict(n) for n in (1, 3, 5, 7, 9, 10, 18)] == [1.0, 2.0, 3.0, 7.0, 11.0, 13.0, 29.0]
    assert times.predict(19) is None


def test_what_was_never_measured_is_not_guessed() -> None:
    times = StepTimes()
    assert times.predict(1) is None
    times.observe(64, 5.0)
    assert (times.predict(1), times.predict(64), times.predict(65)) == (None, 5.0, None)
    assert allot([Proposal(Any, [4], [1.0])], 1, 99, times) == [0]


def test_times_follow_the_machine_but_not_one_slow_step() -> None:
    times = times_of(n1=1.0)
    times.observe(1, 100.0)
    assert times.predict(1) == pytest.approx(1.25)
    for _ in range(60):
        times.observe(1, 3.0)
    assert times.predict(1) == pytest.approx(3.0, rel=0.01)


def test_old_times_are_forgotten() -> None:
    times = times_of(n1=1.0, n4=40.0, n8=2.0)
    for _ in range(600):
        times.observe(1, 1.0)
        times.observe(8, 2.0)
    assert times.predict(4) == pytest.approx(1 + 3 / 7)


def test_drafts_pay_while_their_chance_is_worth_the_row() -> None:
    # A row more costs a fifth of a step of one row.
    times = times_of(n1=1.0, n11=3.0)

    def lengths(*chances: list[float], num_rows: int = 1, room: int = 99) -> list[int]:
        return allot([Proposal(Any, [0] * len(c), c) for c in chances], num_rows, room, times)

    assert lengths([0.9, 0.8, 0.7, 0.6, 0.5]) == [5]
    assert lengths([0.9, 0.2]) == [1]
    assert lengths([0.19, 0.1]) == [0]
    # 4 % more work a second is not worth the look-up.
    assert lengths([0.25]) == [0]
    assert lengths([]) == [0]
    # The first alone would lose, all together win.
    assert lengths([0.2, 0.2, 0.2]) == [0]
    assert lengths([0.9, 0.9, 0.9], room=2) == [2]
    # Of two sequences the likelier drafts are taken.
    assert lengths([0.9, 0.3, 0.1], [0.8, 0.79], num_rows=2) == [1, 2]


def test_steps_that_jump_in_time_are_filled_to_the_next_jump() -> None:
    times = times_of(n1=1.0, n2=1.9, n3=1.95, n4=2.0, n5=4.0)
    assert allot([Proposal(Any, [0] * 4, [0.9, 0.8, 0.7, 0.6])], 1, 99, times) == [3]


# ---------------------------------------------------------------------- what repeats


def draft_of(ids: list[int], count: int = 4, num_prompt: int = 10**6) -> list[int]:
    lookup, trust = Lookup(), Trust()
    lookup.read(ids, min(num_prompt, len(ids)), trust)
    tokens, chances = lookup.draft(ids, count, trust)
    assert len(tokens) == len(chances)
    assert chances == sorted(chances, reverse=True)
    return tokens


def test_the_longest_earlier_match_is_followed() -> None:
    assert draft_of([1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3]) == [50, 9, 2, 3]
    assert draft_of([2, 3, 50, 9, 2, 3, 60, 1, 2, 3], 2) == [60, 1]
    assert draft_of([7, 3, 4, 5, 3], 2) == [4, 5]
    assert draft_of([1, 2, 3]) == draft_of([]) == draft_of([1]) == []


def test_a_draft_beyond_the_end_goes_round() -> None:
    assert draft_of([1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert draft_of([4, 4], 3) == [4, 4, 4]


def test_trust_is_learned_from_the_reply_only() -> None:
    trust, lookup = Trust(), Lookup()
    ids = [1, 2, 3, 1, 2]
    before = [trust.rate(n) for n in range(LONGEST_MATCH + 1)]
    lookup.read(ids, 5, trust)
    assert [trust.rate(n) for n in range(LONGEST_MATCH + 1)] == before
    for _ in range(400):
        ids += [3, 1, 2]
        lookup.read(ids, 5, trust)
    assert trust.rate(LONGEST_MATCH) > 0.999
    for token in range(10, 410):
        ids += [1, 2, token]
        lookup.read(ids, 5, trust)
    assert trust.rate(2) < 0.02


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 60), st.integers(0, 12))
def test_reading_in_pieces_finds_a_place_that_ends_alike(ids: list[int], num_prompt: int, count: int) -> None:
    num_prompt = min(num_prompt, len(ids))
    lookup, trust = Lookup(), Trust()
    for end in range(num_prompt, len(ids) + 1):
        lookup.read(ids[:end], num_prompt, trust)
        tokens, chances = lookup.draft(ids[:end], count, trust)
        assert len(tokens) == len(chances) <= count
        assert all(chance >= LEAST_CHANCE for chance in chances)
        if ids[end - 1] not in ids[: end - 1]:
            assert tokens == []
        elif count and tokens:
            # What is foreseen has followed the last token before.
            assert any(ids[i] == ids[end - 1] and ids[i + 1] == tokens[0] for i in range(end - 1))
        elif count:
            assert lookup._hits / lookup._expected * trust.rate(lookup._length) < LEAST_CHANCE


def test_a_reply_that_repeats_nothing_is_found_out() -> None:
    trust, lookup = Trust(), Lookup()
    ids = [1, 2, 1]
    lookup.read(ids, 3, trust)
    before = lookup.draft(ids, 1, trust)[1][0]
    for token in range(10, 40):
        ids += [1, token]
        lookup.read(ids, 3, trust)
        # Others are not blamed for it.
        trust = Trust()
    lookup.read([*ids, 1], 3, trust)
    assert lookup.draft([*ids, 1], 1, trust)[1][0] < 0.6 * before
