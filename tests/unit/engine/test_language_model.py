"""Chat, stream, generate and the numbers, over the reference decoder and a tokenizer of single characters."""

from __future__ import annotations

import copy
import gc
import inspect
import signal
import threading
from typing import Any

import numpy as np
import pytest
from tests.reference import log_softmax, random_weights
from tests.unit.engine.tiny import BOS, EOS, reference_engine, reference_model, tiny_tokenizer

from minicpm.architecture import ModelConfig
from minicpm.engine import LanguageModel, Limits, Sampler
from minicpm.engine.settings import _KNOWN, DEFAULTS, Settings, build_request
from minicpm.errors import ConfigError, DataError, EngineError

HISTORY = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


@pytest.fixture
def model(tiny_config: ModelConfig) -> LanguageModel:
    return reference_model(tiny_config)


def prompt_text(model: LanguageModel, stream: Any) -> str:
    """What the model was shown, control tokens included."""
    return model.tokenizer.decode(stream._sequence.request.prompt, skip_special=False)


# ---------------------------------------------------------------------- chat and stream


def test_chat_returns_the_reply_and_a_new_history(model: LanguageModel) -> None:
    history = copy.deepcopy(HISTORY)
    reply, after = model.chat("three", history, max_new_tokens=9, seed=1)
    assert history == HISTORY
    assert after == [*HISTORY, {"role": "user", "content": "three"}, {"role": "assistant", "content": reply}]
    assert reply
    after[0]["content"] = "changed"
    assert history == HISTORY


def test_a_last_token_that_is_real_is_kept(model: LanguageModel) -> None:
    stream = model.stream("x", max_new_tokens=5, seed=3)
    text = "".join(stream)
    assert stream.result.finish_reason == "length"
    assert len(stream.result.token_ids) == 5
    assert text == model.tokenizer.decode(stream.result.token_ids) == stream.result.text


def test_a_stream_is_the_chat_in_pieces(model: LanguageModel) -> None:
    with model.stream("hello", HISTORY, max_new_tokens=30, seed=5) as stream:
        pieces = list(stream)
    assert len(pieces) > 1
    assert all(pieces)
    reply, history = model.chat("hello", HISTORY, max_new_tokens=30, seed=5)
    assert "".join(pieces) == reply
    assert stream.history == history
    assert list(stream) == []
    result = stream.result
    assert result.num_new_tokens == 30
    assert result.num_prompt_tokens == len(model.tokenizer.apply_chat(history[:-1]))
    assert 0 <= result.queue_seconds <= result.first_token_seconds <= result.seconds
    assert result.tokens_per_second > 0
    assert result.logprobs is None


def test_what_the_model_is_shown(model: LanguageModel) -> None:
    def shown(*arguments: Any, **options: Any) -> str:
        with model.stream(*arguments, max_new_tokens=1, **options) as stream:
            return prompt_text(model, stream).removeprefix("<s>").removeprefix(" ")

    assert shown("hi") == "<用户>hi<AI>"
    assert shown("hi", HISTORY) == "<用户>one<AI>two<用户>hi<AI>"
    assert shown("hi", HISTORY, system="be brief") == "be brief<用户>one<AI>two<用户>hi<AI>"
    old = [{"role": "system", "content": "be long"}, *HISTORY]
    assert shown("hi", old) == "be long<用户>one<AI>two<用户>hi<AI>"
    assert shown("hi", old, system="be brief") == "be brief<用户>one<AI>two<用户>hi<AI>"
    assert shown("rules", role="system") == "rules"
    # What a person types is text.
    with model.stream("</s>", max_new_tokens=1) as stream:
        ids = stream._sequence.request.prompt
    assert ids[0] == BOS
    assert EOS not in ids
    assert ids.count(BOS) == 1


def test_the_system_message_stays_in_the_history(model: LanguageModel) -> None:
    _, history = model.chat("hi", system="be brief", max_new_tokens=2)
    assert history[0] == {"role": "system", "content": "be brief"}
    assert [m["role"] for m in history] == ["system", "user", "assistant"]


def forced(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, text: str, *, end: bool = True) -> None:
    """Let the model say `text` whatever its weights say, and then an end token."""
    script = model.tokenizer.encode(text) + ([EOS] if end else [])

    def choose(*arguments: Any) -> int:
        return script.pop(0) if script else 50

    monkeypatch.setattr("minicpm.engine.outputs.choose_token", choose)


@pytest.mark.parametrize("mark", ["<用户>", "<AI>"])
def test_a_reply_ends_where_the_model_goes_on_with_the_next_turn(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    forced(model, monkeypatch, f"fine <b> <A{mark}and you?", end=False)
    stream = model.stream("how are you?")
    pieces = list(stream)
    assert "".join(pieces) == "fine <b> <A"
    assert stream.result.finish_reason == "stop"
    # Held back only while it could be the mark.
    assert pieces[:4] == ["f", "i", "n", "e"]


def test_a_reply_ends_at_the_end_token_and_it_has_no_text(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(model, monkeypatch, "yes")
    stream = model.stream("?")
    assert list(stream) == ["y", "e", "s"]
    assert stream.result.finish_reason == "stop"
    assert stream.result.token_ids[-1] == EOS


def test_half_a_character_is_never_shown(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(model, monkeypatch, "山🤗")
    assert list(model.stream("?")) == ["山", "🤗"]


def test_stop_takes_one_text_or_several(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for stop in ("cd", ["x", "cd"]):
        forced(model, monkeypatch, "abcdef")
        assert model.chat("?", stop=stop)[0] == "ab"


def test_an_unfinished_stream_tells_what_it_has(model: LanguageModel) -> None:
    stream = model.stream("x", max_new_tokens=50, seed=3)
    assert stream.result.finish_reason is None
    first = next(stream)
    assert stream.result.text == first
    assert stream.history[-1] == {"role": "assistant", "content": first}
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    assert list(stream) == []
    assert model.engine.load.num_held_blocks == 0


def test_a_stream_that_is_forgotten_frees_its_blocks(model: LanguageModel) -> None:
    stream = model.stream("x", max_new_tokens=50)
    next(stream)
    assert model.engine.load.num_running == 1
    del stream
    gc.collect()
    assert (model.engine.load.num_running, model.engine.load.num_held_blocks) == (0, 0)


def test_ctrl_c_ends_one_reply_and_the_model_goes_on(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = model.chat("again", max_new_tokens=10, seed=1)[0]
    other = model.stream("other", max_new_tokens=10, seed=2)
    decoder = model.engine._decoder
    step, num_calls = decoder.step, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(decoder, "step", interrupted)
    stream, pieces = model.stream("x", max_new_tokens=50, seed=3), []
    with pytest.raises(KeyboardInterrupt):
        pieces.extend(stream)
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text.startswith("".join(pieces))
    assert 1 <= stream.result.num_new_tokens <= 3
    assert model.chat("again", max_new_tokens=10, seed=1)[0] == calm
    assert "".join(other) == model.chat("other", max_new_tokens=10, seed=2)[0]
    for call in (lambda: model.chat("x"), lambda: model.generate(["x", "y"]), lambda: model.embed("x")):
        num_calls = 3
        with pytest.raises(KeyboardInterrupt):
            call()
    assert (model.engine.load.num_running, model.engine.load.num_held_blocks) == (0, 0)


# ---------------------------------------------------------------------- generate


def test_generate_continues_plain_text(model: LanguageModel) -> None:
    (alone,) = model.generate("abc", max_new_tokens=7, seed=4)
    same, ids, other = model.generate(["abc", "abc", "de"], max_new_tokens=7, seed=4)
    assert alone.token_ids == same.token_ids == ids.token_ids
    assert alone.num_prompt_tokens == 5  # bos, ▁, a, b, c
    assert other.num_prompt_tokens == 4
    (by_ids,) = model.generate([[BOS, *model.tokenizer.encode("abc")]], max_new_tokens=7, seed=4)
    assert by_ids.token_ids == alone.token_ids
    assert model.generate([]) == []
    assert "".join(model.continue_text("abc", max_new_tokens=7, seed=4)) == alone.text


def test_generate_has_a_limit_of_its_own(tiny_config: ModelConfig) -> None:
    model = reference_model(tiny_config, limits=Limits(max_parallel=2))
    results = model.generate(["a", "b"] * 5, temperature=2.0, seed=2, logit_bias={EOS: -1000}, max_new_tokens=3)
    assert [r.num_new_tokens for r in results] == [3] * 10
    request = model._continuation("a", {})
    assert request.max_new_tokens == 256


def test_logprobs_of_a_reply_come_when_asked(model: LanguageModel) -> None:
    (result,) = model.generate("abc", max_new_tokens=4, logprobs=2)
    assert [record.token_id for record in result.logprobs] == result.token_ids
    assert all(len(record.top) == 2 for record in result.logprobs)
    assert result.logprobs[0].token == model.tokenizer.token_text(result.token_ids[0])


def test_one_bad_prompt_of_many_stops_before_anything_runs(model: LanguageModel) -> None:
    with pytest.raises(EngineError, match="the prompt has 602 tokens; the context holds 512"):
        model.generate(["a", "b" * 600])
    with pytest.raises(EngineError, match="602 tokens; the context holds 512"):
        model.embed(["a", "b" * 600])
    assert model.engine.load.num_steps == 0


# ---------------------------------------------------------------------- numbers


def test_logprobs_of_a_text(model: LanguageModel, tiny_config: ModelConfig) -> None:
    _, decoder = reference_engine(tiny_config)
    records = model.logprobs("hello world", top=1)
    ids = [BOS, *model.tokenizer.encode("hello world")]
    assert [r.token_id for r in records] == ids
    assert records[0].logprob is None
    truth = log_softmax(decoder.full_logits(ids))
    assert [r.logprob for r in records[1:]] == pytest.approx([truth[i, t] for i, t in enumerate(ids[1:])], abs=1e-4)
    assert [r.top[0].token_id for r in records[1:]] == truth[:-1].argmax(axis=1).tolist()
    assert model.logprobs(ids) == model.logprobs("hello world")
    assert model.next_logprobs("hello world") == pytest.approx(truth[-1], abs=1e-4)
    assert model.next_logprobs(ids).dtype == np.float32


def test_embeddings(model: LanguageModel, tiny_config: ModelConfig) -> None:
    _, decoder = reference_engine(tiny_config)
    texts = ["a cat", "stock exchange", "x"]
    vectors = model.embed(texts)
    assert vectors.shape == (3, 96)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    hidden = decoder.full_hidden([BOS, *model.tokenizer.encode(texts[1])])
    assert model.embed(texts[1], normalize=False)[0] == pytest.approx(hidden.mean(axis=0), abs=1e-4)
    assert model.embed(texts[1], pooling="last", normalize=False)[0] == pytest.approx(hidden[-1], abs=1e-4)
    assert model.embed([]).shape == (0, 96)
    with pytest.raises(EngineError, match="'mean' or 'last', got 'max'"):
        model.embed("x", pooling="max")


# ---------------------------------------------------------------------- settings


def test_the_keywords_are_those_of_the_sampler_and_four_more() -> None:
    assert Settings.__annotations__.keys() == _KNOWN
    assert {*inspect.signature(Sampler).parameters, "max_new_tokens", "stop", "logprobs", "speculate"} == _KNOWN
    sampler = build_request([1], {}, end_ids=frozenset()).sampler
    assert sampler == Sampler(temperature=0.3, top_p=0.8, top_k=50) == Sampler(**DEFAULTS)


def test_every_keyword_reaches_the_request() -> None:
    given: Settings = {
        "max_new_tokens": 3,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.6,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "logit_bias": {5: 1.0},
        "seed": 9,
        "stop": "x",
        "logprobs": 2,
        "speculate": "off",
    }
    assert given.keys() == _KNOWN
    request = build_request([1], given, end_ids=frozenset({2}), stops=("y",))
    for name, value in given.items():
        found = getattr(request, name, getattr(request.sampler, name, None))
        assert found == (["x", "y"] if name == "stop" else value)
    assert request.end_ids == {2}


@pytest.mark.parametrize("method", ["chat", "stream", "generate", "continue_text"])
def test_an_unknown_keyword_is_rejected_with_the_nearest(model: LanguageModel, method: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'; did you mean 'temperature'"):
        getattr(model, method)("x", temprature=1)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"temperature": -1}, ConfigError, "temperature .*-1"),
        ({"max_new_tokens": 0}, EngineError, "max_new_tokens must be at least 1, .*got 0"),
        ({"max_new_tokens": -5}, EngineError, "got -5"),
        ({"stop": [""]}, ConfigError, "stop text"),
        ({"history": [{"role": "user"}]}, DataError, "content"),
        ({"history": [{"role": "user", "content": "b" * 600}]}, EngineError, "6.. tokens; the context holds 512"),
    ],
    ids=str,
)
def test_what_cannot_be_is_an_error_of_ours(
    model: LanguageModel, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        model.chat("x", **options)
    assert not model.engine.has_work


# ---------------------------------------------------------------------- threads and the end


def test_threads_share_steps_and_each_gets_its_own_text(tiny_config: ModelConfig) -> None:
    model = reference_model(tiny_config, limits=Limits(max_parallel=4))
    expected = {i: model.chat(f"question {i}", max_new_tokens=15, seed=i)[0] for i in range(6)}
    num_steps = model.engine.load.num_steps
    found = {}
    start = threading.Barrier(6)

    def ask(i: int) -> None:
        start.wait(timeout=30)
        found[i] = "".join(model.stream(f"question {i}", max_new_tokens=15, seed=i))

    threads = [threading.Thread(target=ask, args=[i]) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == expected
    assert model.engine.load.num_steps - num_steps < num_steps


def test_no_thread_waits_for_the_whole_of_anothers_reply(tiny_config: ModelConfig) -> None:
    model = reference_model(tiny_config)
    seen, lock, start = [], threading.Lock(), threading.Barrier(2)

    def ask(name: str) -> None:
        start.wait(timeout=30)
        for _ in model.stream("x", max_new_tokens=60, logit_bias={EOS: -1000}, seed=1):
            with lock:
                seen.append(name)

    threads = [threading.Thread(target=ask, args=[name]) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    # Each reads what came while the other stepped, not all of it at the end.
    middle = seen[len(seen) // 4 : 3 * len(seen) // 4]
    assert min(middle.count("a"), middle.count("b")) >= len(middle) // 5


def test_a_stream_forgotten_in_the_middle_of_a_step_is_freed_by_the_next(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten = [model.stream("x", max_new_tokens=50)]
    plan = model.engine._scheduler.plan

    def planning() -> Any:
        forgotten.clear()  # as the garbage collector may
        return plan()

    monkeypatch.setattr(model.engine._scheduler, "plan", planning)
    model.chat("y", max_new_tokens=5, logit_bias={EOS: -1000})
    assert not forgotten
    assert (model.engine.load.num_running, model.engine.load.num_held_blocks) == (0, 0)


def test_a_closed_model_says_so(tiny_config: ModelConfig) -> None:
    with reference_model(tiny_config) as model:
        stream = model.stream("x", max_new_tokens=50)
        next(stream)
    with pytest.raises(EngineError, match="the model is closed"):
        next(stream)
    with pytest.raises(EngineError, match="the model is closed"):
        model.chat("x")
    model.close()


def test_facts(model: LanguageModel, tiny_config: ModelConfig) -> None:
    assert model.config is tiny_config
    assert model.context_length == 512
    assert model.tokenizer.encode("a") == tiny_tokenizer().encode("a")
    assert BOS not in model.tokenizer.encode("a")
    assert random_weights(tiny_config).keys() == tiny_config.weight_shapes().keys()


def test_continuations_are_scored_after_contexts_that_are_computed_once(tiny_config: ModelConfig) -> None:
    model = reference_model(tiny_config)
    context = model.tokenizer.add_bos(model.tokenizer.encode("a long enough beginning that fills more than one block"))
    tails = [model.tokenizer.encode(text) for text in ("yes", "no or not", "x")]
    scored = model.score([(context, tail) for tail in tails])
    num_computed = model.engine.load.num_computed_tokens
    assert num_computed < len(context) * 2 + sum(map(len, tails))
    for tail, tokens in zip(tails, scored, strict=True):
        alone = model.logprobs([*context, *tail], top=1)[len(context) :]
        assert [token.token_id for token in tokens] == tail
        assert [token.logprob for token in tokens] == pytest.approx([token.logprob for token in alone], abs=1e-5)
        assert [token.top[0].token_id for token in tokens] == [token.top[0].token_id for token in alone]
    with pytest.raises(EngineError, match="at least one token each"):
        model.score([(context, [])])
