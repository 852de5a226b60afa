"""The engine over the reference decoder: what comes out is what the model says, and nothing is left behind."""

from __future__ import annotations

import signal
import threading
from typing import Any

import numpy as np
import pytest
from tests.reference import ReferenceDecoder, log_softmax
from tests.unit.engine.tiny import complete, reference_engine, run_all, tiny_tokenizer

from minicpm.architecture import ModelConfig
from minicpm.engine import Limits, QueueFullError, Request, Sampler, Sequence
from minicpm.engine.sharing import publish
from minicpm.errors import ConfigError, EngineError

GREEDY = Sampler(temperature=0)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 331, length).tolist()


def is_greedy(decoder: ReferenceDecoder, sequence: Sequence) -> bool:
    """Whether each token of the reply is the model's likeliest after everything before it."""
    logits = decoder.full_logits(sequence.token_ids[:-1])[sequence.num_prompt_tokens - 1 :]
    return bool(sequence.new_ids) and logits.argmax(axis=1).tolist() == sequence.new_ids


def test_tokens_logprobs_and_distribution_are_those_of_the_model(tiny_config: ModelConfig) -> None:
    engine, decoder = reference_engine(tiny_config)
    prompt = prompt_of(45)
    request = Request(prompt, GREEDY, max_new_tokens=6, logprobs=3, prompt_logprobs=2, wants_distribution=True)
    (sequence,) = complete(engine, request)
    assert len(sequence.new_ids) == 6
    assert is_greedy(decoder, sequence)
    truth = log_softmax(decoder.full_logits(sequence.token_ids))
    assert sequence.finish_reason == "length"
    assert sequence.distribution == pytest.approx(truth[44], abs=1e-4)
    assert sequence.prompt_logprobs[0].logprob is None
    records = [*sequence.prompt_logprobs[1:], *sequence.logprobs]
    assert [r.token_id for r in sequence.prompt_logprobs] == prompt
    assert [r.token_id for r in sequence.logprobs] == sequence.new_ids
    for place, record in enumerate(records):
        assert record.logprob == pytest.approx(truth[place, sequence.token_ids[place + 1]], abs=1e-4)
        best = np.argsort(-truth[place])[: len(record.top)]
        assert [t.token_id for t in record.top] == best.tolist()
        assert [t.logprob for t in record.top] == pytest.approx(truth[place, best], abs=1e-4)
    assert {len(r.top) for r in sequence.prompt_logprobs[1:]} == {2}
    assert {len(r.top) for r in sequence.logprobs} == {3}


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooled_states_are_those_of_the_model(tiny_config: ModelConfig, pooling: Any) -> None:
    engine, decoder = reference_engine(tiny_config, limits=Limits(max_step_tokens=16, max_output_rows=7))
    prompts = [prompt_of(n, n) for n in (1, 40, 33)]
    # Beside a request for tokens, with which steps alternate.
    requests = [Request(p, max_new_tokens=0, pooling=pooling) for p in prompts]
    *pooled, plain = complete(engine, *requests, Request(prompts[1], GREEDY, max_new_tokens=5))
    assert is_greedy(decoder, plain)
    for sequence, prompt in zip(pooled, prompts, strict=True):
        hidden = decoder.full_hidden(prompt)
        assert sequence.finish_reason == "stop"
        assert sequence.pooled == pytest.approx(hidden.mean(axis=0) if pooling == "mean" else hidden[-1], abs=1e-4)


def test_a_second_prompt_with_the_same_beginning_computes_the_rest_only(tiny_config: ModelConfig) -> None:
    engine, decoder = reference_engine(tiny_config)
    prompt = prompt_of(100)
    complete(engine, Request(prompt, GREEDY, max_new_tokens=1))
    before = decoder.num_rows_computed
    (again,) = complete(engine, Request([*prompt[:70], 5, 6], GREEDY, max_new_tokens=1))
    assert decoder.num_rows_computed - before == 72 - 70
    assert again.num_cached_tokens == 70
    assert is_greedy(decoder, again)


@pytest.mark.parametrize("max_step_tokens", [512, 100])
def test_eight_requests_at_once_compute_their_common_prefix_once(
    tiny_config: ModelConfig, max_step_tokens: int
) -> None:
    limits = Limits(max_parallel=8, max_step_tokens=max_step_tokens, max_output_rows=0)
    engine, decoder = reference_engine(tiny_config, num_blocks=64, context_length=512, limits=limits)
    prefix = prompt_of(500)
    requests = [Request([*prefix, i, i + 1], GREEDY, max_new_tokens=2) for i in range(8)]
    sequences = complete(engine, *requests)
    # 15 whole blocks are shared, 20 tokens more are copied; each request computes its own 2, and a reply.
    assert decoder.num_rows_computed == engine.load.num_computed_tokens == 500 + 8 * (2 + 1)
    assert [s.num_cached_tokens for s in sequences] == [0, *[500] * 7]
    assert is_greedy(decoder, sequences[0])
    assert is_greedy(decoder, sequences[7])
    assert engine.load.num_held_blocks == 0


def test_a_conversation_goes_on_from_the_reply_in_the_cache(tiny_config: ModelConfig) -> None:
    engine, decoder = reference_engine(tiny_config)
    (first,) = complete(engine, Request(prompt_of(20), GREEDY, max_new_tokens=20))
    (second,) = complete(engine, Request([*first.token_ids, 7], GREEDY, max_new_tokens=3))
    assert second.num_cached_tokens == 39
    assert is_greedy(decoder, second)


def test_when_blocks_run_out_everyone_still_gets_the_right_tokens(tiny_config: ModelConfig) -> None:
    engine, decoder = reference_engine(
        tiny_config, num_blocks=5, context_length=120, limits=Limits(max_step_tokens=50, max_mixed_tokens=20)
    )
    prompts = [prompt_of(n, n) for n in (30, 31, 60)]
    sequences = complete(engine, *(Request(p, GREEDY, max_new_tokens=40) for p in prompts))
    assert engine.load.num_preemptions > 0
    for sequence in sequences:
        assert len(sequence.new_ids) == 40
        assert is_greedy(decoder, sequence)
    assert engine.load.num_held_blocks == 0


def test_scored_prompts_survive_preemption(tiny_config: ModelConfig) -> None:
    engine, decoder = reference_engine(
        tiny_config, num_blocks=4, context_length=128, limits=Limits(max_step_tokens=50, max_output_rows=10)
    )
    prompts = [prompt_of(n, n) for n in (30, 61)]
    requests = [Request(p, GREEDY, max_new_tokens=40, prompt_logprobs=0) for p in prompts]
    for sequence, prompt in zip(complete(engine, *requests), prompts, strict=True):
        truth = log_softmax(decoder.full_logits(prompt))
        expected = [truth[i, token] for i, token in enumerate(prompt[1:])]
        assert [r.logprob for r in sequence.prompt_logprobs[1:]] == pytest.approx(expected, abs=1e-4)
        assert is_greedy(decoder, sequence)
    assert engine.load.num_preemptions > 0


def test_a_prompt_put_back_half_read_is_not_read_twice(tiny_config: ModelConfig) -> None:
    engine, decoder = reference_engine(tiny_config, limits=Limits(max_output_rows=20))
    prompt = prompt_of(90)
    scored = engine.add(Request(prompt, max_new_tokens=0, prompt_logprobs=0))
    pooled = engine.add(Request(prompt, max_new_tokens=0, pooling="mean"))
    for _ in range(4):
        engine.step()
    assert (scored.num_read, pooled.num_read) == (40, 40)
    engine._scheduler._preempt(pooled)
    engine._scheduler._preempt(scored)
    list(run_all(engine))
    truth = log_softmax(decoder.full_logits(prompt))
    expected = [truth[i, token] for i, token in enumerate(prompt[1:])]
    assert [r.logprob for r in scored.prompt_logprobs[1:]] == pytest.approx(expected, abs=1e-4)
    assert pooled.pooled == pytest.approx(decoder.full_hidden(prompt).mean(axis=0), abs=1e-4)


def test_a_sequence_that_returns_to_another_slot_writes_into_its_own_blocks(tiny_config: ModelConfig) -> None:
    engine, decoder = reference_engine(tiny_config)
    old = engine.add(Request(prompt_of(40), GREEDY, max_new_tokens=4))
    young = engine.add(Request(prompt_of(9, 1), GREEDY, max_new_tokens=20))
    engine.step()
    slots = old.slot, young.slot
    engine._scheduler._preempt(young)
    engine.cancel(old)
    engine.step()
    assert young.slot == slots[0]
    list(run_all(engine))
    (again,) = complete(engine, Request(prompt_of(40), GREEDY, max_new_tokens=4))
    assert again.num_cached_tokens == 39
    assert is_greedy(decoder, young)
    assert is_greedy(decoder, again)


def test_blocks_found_in_the_middle_of_a_prompt_replace_those_set_aside(tiny_config: ModelConfig) -> None:
    engine, decoder = reference_engine(tiny_config, limits=Limits(max_step_tokens=32))
    prompt, pool = prompt_of(100), engine._scheduler.pool
    (first,) = complete(engine, Request(prompt, GREEDY, max_new_tokens=1))
    pool._forget(pool._by_digest[first.digests[0]])
    before = decoder.num_rows_computed
    (again,) = complete(engine, Request(prompt, GREEDY, max_new_tokens=4))
    assert decoder.num_rows_computed - before == 32 + 4 + 3
    assert again.num_cached_tokens == 64
    assert is_greedy(decoder, again)


def test_the_context_ends_a_reply_without_a_limit(tiny_config: ModelConfig) -> None:
    engine, _ = reference_engine(tiny_config, context_length=50)
    (sequence,) = complete(engine, Request(prompt_of(45), GREEDY))
    assert len(sequence.token_ids) == 50
    assert sequence.finish_reason == "length"
    (sequence,) = complete(engine, Request(prompt_of(49), GREEDY, max_new_tokens=9))
    assert len(sequence.new_ids) == 1


def test_events_tell_the_whole_story(tiny_config: ModelConfig) -> None:
    engine, _ = reference_engine(tiny_config, tokenizer=tiny_tokenizer())
    sequence = engine.add(Request(prompt_of(5), Sampler(seed=1), max_new_tokens=30))
    events = list(run_all(engine))
    assert [e.token_id for e in events] == sequence.new_ids
    assert "".join(e.text for e in events) == sequence.text == tiny_tokenizer().decode(sequence.new_ids)
    assert [e.finish_reason for e in events] == [None] * 29 + ["length"]
    assert engine.step() == []
    times = sequence.timings
    assert times.arrived <= (times.started or 0) <= (times.first_token or 0) <= (times.finished or 0)


def test_end_tokens_and_stop_texts_end_a_reply(tiny_config: ModelConfig) -> None:
    tokenizer = tiny_tokenizer()
    engine, _ = reference_engine(tiny_config, tokenizer=tokenizer)
    (free,) = complete(engine, Request(prompt_of(5), Sampler(seed=1), max_new_tokens=60))
    end_id = free.new_ids[20]
    cut = free.new_ids.index(end_id) + 1
    (ended,) = complete(engine, Request(prompt_of(5), Sampler(seed=1), end_ids={end_id}))
    assert (ended.new_ids, ended.finish_reason) == (free.new_ids[:cut], "stop")
    stop = free.text[20:23]
    (stopped,) = complete(engine, Request(prompt_of(5), Sampler(seed=1), stop=[stop], max_new_tokens=60))
    assert (stopped.text, stopped.finish_reason) == (free.text[: free.text.index(stop)], "stop")


def test_tokens_that_the_tokenizer_does_not_have_are_never_chosen(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(vocab_size=1000)
    engine, _ = reference_engine(config, tokenizer=tiny_tokenizer())
    (sequence,) = complete(engine, Request([5, 6], Sampler(seed=1, temperature=5.0), max_new_tokens=60))
    assert max(sequence.new_ids) < 331
    with pytest.raises(EngineError, match="outside the vocabulary of 331"):
        engine.add(Request([331]))


def test_cancelling_frees_everything_at_once(tiny_config: ModelConfig) -> None:
    engine, decoder = reference_engine(tiny_config, limits=Limits(max_parallel=2))
    running, other, waiting = (engine.add(Request(prompt_of(40, i), GREEDY, max_new_tokens=4)) for i in range(3))
    engine.step()
    for sequence in (running, waiting, running):
        engine.cancel(sequence)
    assert [s.finish_reason for s in (running, other, waiting)] == ["cancelled", None, "cancelled"]
    events = list(run_all(engine))
    assert {event.sequence for event in events} == {other}
    assert is_greedy(decoder, other)
    assert (engine.load.num_held_blocks, engine.load.num_running, engine.load.num_waiting) == (0, 0, 0)


def test_cancelling_while_the_step_runs(tiny_config: ModelConfig) -> None:
    engine, decoder = reference_engine(tiny_config)
    one, other = (engine.add(Request(prompt_of(40, i), GREEDY, max_new_tokens=4)) for i in range(2))
    step = decoder.step

    def cancelling(*arguments: Any) -> Any:
        thread = threading.Thread(target=engine.cancel, args=[one])
        thread.start()
        thread.join(timeout=10)
        assert one.is_finished
        return step(*arguments)

    decoder.step = cancelling
    list(run_all(engine))
    assert one.new_ids == []
    assert is_greedy(decoder, other)
    assert engine.load.num_held_blocks == 0


@pytest.mark.parametrize("moment", ["before", "after"])
def test_after_ctrl_c_the_same_step_runs_again(tiny_config: ModelConfig, moment: str) -> None:
    engine, decoder = reference_engine(tiny_config)
    sequences = [engine.add(Request(prompt_of(40, i), Sampler(seed=i), max_new_tokens=5)) for i in range(3)]
    step, num_calls = decoder.step, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if moment == "before" and num_calls % 2:
            signal.raise_signal(signal.SIGINT)
        out = step(*arguments)
        if moment == "after" and num_calls % 2:
            signal.raise_signal(signal.SIGINT)
        return out

    decoder.step = interrupted
    num_interrupts, texts = 0, []
    while engine.has_work:
        try:
            texts += [event.token_id for event in engine.step()]
        except KeyboardInterrupt:
            num_interrupts += 1
    assert num_interrupts == 5
    decoder.step = step
    fresh, _ = reference_engine(tiny_config)
    calm = complete(fresh, *(Request(prompt_of(40, i), Sampler(seed=i), max_new_tokens=5) for i in range(3)))
    assert [s.new_ids for s in sequences] == [s.new_ids for s in calm]
    assert sorted(texts) == sorted(token for s in sequences for token in s.new_ids)
    assert engine.load.num_held_blocks == 0


def test_ctrl_c_in_the_books_waits_until_they_are_closed(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = reference_engine(tiny_config)
    sequence = engine.add(Request(prompt_of(40), GREEDY, max_new_tokens=2))

    def interrupted(sequence: Any, pool: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        publish(sequence, pool)

    monkeypatch.setattr("minicpm.engine.engine.publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    # The step was whole, and its event is still there.
    assert len(sequence.new_ids) == 1
    assert [event.token_id for event in run_all(engine)] == sequence.new_ids
    assert len(sequence.new_ids) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too long": ({"prompt": [3] * 51}, EngineError, "the prompt has 51 tokens; the context holds 50"),
    "no room": ({"prompt": [3] * 50}, EngineError, "50 tokens and leaves no room for a reply; the context holds 50"),
    "empty": ({"prompt": []}, EngineError, "no tokens"),
    "unknown id": ({"prompt": [331]}, EngineError, "outside the vocabulary of 331"),
    "negative id": ({"prompt": [-1]}, EngineError, "outside the vocabulary"),
    "not ids": ({"prompt": [1.5]}, EngineError, "outside the vocabulary"),
    "bias": ({"prompt": [1], "sampler": Sampler(logit_bias={331: 1})}, EngineError, "logit_bias names an id"),
    "limit": ({"prompt": [1], "max_new_tokens": -1}, EngineError, "max_new_tokens must be at least 0, got -1"),
    "logprobs": ({"prompt": [1], "logprobs": -1}, EngineError, "logprobs must be at least 0"),
    "two kinds": ({"prompt": [1], "pooling": "mean", "max_new_tokens": 3}, EngineError, "two requests"),
    "stop without text": ({"prompt": [1], "stop": ["x"]}, ConfigError, "need a tokenizer"),
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD)
def test_a_request_that_cannot_be_served_is_refused_at_once(
    tiny_config: ModelConfig, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    engine, _ = reference_engine(tiny_config, context_length=50)
    with pytest.raises(kind, match=message):
        engine.add(Request(**options))
    assert not engine.has_work


def test_a_prompt_that_is_only_read_may_fill_the_context(tiny_config: ModelConfig) -> None:
    engine, _ = reference_engine(tiny_config, context_length=50)
    (sequence,) = complete(engine, Request(prompt_of(50), max_new_tokens=0, prompt_logprobs=0))
    assert len(sequence.prompt_logprobs) == 50


def test_a_full_queue_says_so_and_stays_as_it_is(tiny_config: ModelConfig) -> None:
    engine, _ = reference_engine(tiny_config, limits=Limits(max_waiting=2))
    sequences = [engine.add(Request([i + 1], GREEDY, max_new_tokens=1)) for i in range(2)]
    with pytest.raises(QueueFullError, match="try again later"):
        engine.add(Request([3]))
    list(run_all(engine))
    assert all(s.is_finished for s in sequences)


def test_the_cache_must_hold_one_context(tiny_config: ModelConfig) -> None:
    with pytest.raises(EngineError, match="a context of 512 tokens takes 16 blocks of 32; the KV cache has 15"):
        reference_engine(tiny_config, num_blocks=15)
