"""A smaller model that writes ahead: it changes the pace alone, reads each text once, and pauses where it loses."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.reference import random_weights
from tests.unit.engine.test_speculation import SAMPLERS, Clock, assert_same, prompts
from tests.unit.engine.tiny import complete, tiny_tokenizer
from tests.unit.formats.model_files import random_entries, vocabulary

import minicpm
from minicpm.architecture import ModelConfig
from minicpm.engine import Engine, Request, Sampler
from minicpm.engine.decoder import Decoder
from minicpm.engine.speculation_draft import DraftModel
from minicpm.errors import EngineError
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.weight import Weight

GREEDY = Sampler(temperature=0)


class Counting(Decoder):
    """Counts the rows of its steps."""

    num_rows = 0

    def step(self, tokens: Any, *arguments: Any, **options: Any) -> Any:
        self.num_rows += len(tokens)
        return super().step(tokens, *arguments, **options)


class Slow(Clock):
    """A model whose steps take ten times as long."""

    def predict(self, num_rows: int) -> float | None:
        return 10 * (0.99 + 0.01 * num_rows)


class Half(Clock):
    """A model whose steps take half of that."""

    def predict(self, num_rows: int) -> float | None:
        return 5.0


def make_decoder(config: ModelConfig, seed: int = 0, kind: str = "F32", num_blocks: int = 64) -> Counting:
    arrays = random_weights(config, seed)
    weights = {n: Weight.from_array(a, kind if a.ndim == 2 else "F32") for n, a in arrays.items()}
    return Counting(config, weights, num_threads=1, num_blocks=num_blocks, kernel="portable")


def make_draft(config: ModelConfig, seed: int = 0, kind: str = "F16", **options: Any) -> DraftModel:
    settings: dict[str, Any] = {"num_slots": 4, "context_length": 256, **options}
    num_blocks = settings["num_slots"] * -(-settings["context_length"] // 32)
    draft = DraftModel(make_decoder(config, seed, kind, num_blocks), vocab_size=331, **settings)
    draft._times = Clock()
    return draft


def make_engine(config: ModelConfig, draft: DraftModel | None = None, **options: Any) -> Engine:
    num_blocks = options.get("num_blocks", 64)
    settings: dict[str, Any] = {"num_blocks": num_blocks, "context_length": 256, **options}
    engine = Engine(
        make_decoder(config, num_blocks=num_blocks), config, tokenizer=tiny_tokenizer(), draft=draft, **settings
    )
    engine._speculator.times = Slow()
    return engine


def decoder_of(draft: DraftModel) -> Counting:
    assert isinstance(draft._decoder, Counting)
    return draft._decoder


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_replies_are_those_of_the_larger_model(tiny_config: ModelConfig, sampler: Sampler) -> None:
    wanted = [Request(p, sampler, max_new_tokens=40, logprobs=1) for p in prompts(5, 40, 70)]
    expected = complete(make_engine(tiny_config), *(replace(r, speculate="off") for r in wanted))
    engine = make_engine(tiny_config, make_draft(tiny_config))
    found = complete(engine, *wanted)
    assert_same(found, expected)
    load = engine.load
    # The same model, rounded: it is mostly right, about what is drawn as well.
    assert load.num_accepted_tokens > 0.65 * load.num_drafted_tokens > 50
    assert load.num_steps < 25
    assert load.num_held_blocks == 0


def test_a_model_that_is_wrong_changes_nothing_and_is_soon_left(tiny_config: ModelConfig) -> None:
    wanted = [Request(p, Sampler(seed=1), max_new_tokens=100) for p in prompts(30, 31)]
    draft = make_draft(tiny_config, seed=1)
    draft._times = Half()
    engine = make_engine(tiny_config, draft)
    found = complete(engine, *wanted)
    assert_same(found, complete(make_engine(tiny_config), *(replace(r, speculate="off") for r in wanted)))
    assert draft.rate < 0.6
    assert 0 < engine.load.num_drafted_tokens < 40
    # The next one that asks gets none, and one in sixteen tries again.
    read = decoder_of(draft).num_rows
    for i in range(15):
        complete(engine, Request([200 + i, 3], GREEDY, max_new_tokens=6))
    assert decoder_of(draft).num_rows == read
    complete(engine, Request([250, 3], GREEDY, max_new_tokens=6))
    assert decoder_of(draft).num_rows > read


def test_a_model_as_slow_as_the_larger_one_reads_nothing(tiny_config: ModelConfig) -> None:
    draft = make_draft(tiny_config)
    draft._times = Slow()
    engine = make_engine(tiny_config, draft)
    complete(engine, Request(prompts(60)[0], GREEDY, max_new_tokens=20))
    assert decoder_of(draft).num_rows == 0


def test_its_own_pace_is_measured_before_it_reads(tiny_config: ModelConfig) -> None:
    draft = DraftModel(make_decoder(tiny_config, num_blocks=8), num_slots=1, context_length=256, vocab_size=331)
    draft._measure()
    draft._measure()
    assert decoder_of(draft).num_rows == 2 * (1 + 16)
    assert (draft._times.predict(1) or 0) > 0
    assert draft._slots[0].ids == []


def test_a_text_that_goes_on_is_read_once(tiny_config: ModelConfig) -> None:
    draft = make_draft(tiny_config)
    engine = make_engine(tiny_config, draft)
    (first,) = complete(engine, Request(prompts(100)[0], GREEDY, max_new_tokens=30))
    read = decoder_of(draft).num_rows
    assert 125 <= read <= 150
    (second,) = complete(engine, Request([*first.token_ids, 9, 8], GREEDY, max_new_tokens=10))
    assert decoder_of(draft).num_rows - read < 20
    (truth,) = complete(make_engine(tiny_config), Request([*first.token_ids, 9, 8], GREEDY, max_new_tokens=10))
    assert second.new_ids == truth.new_ids


def test_preemption_and_short_room_change_nothing(tiny_config: ModelConfig) -> None:
    wanted = [Request(p, GREEDY, max_new_tokens=60) for p in prompts(30, 31, 60)]
    options = {"num_blocks": 6, "context_length": 128}
    draft = make_draft(tiny_config, num_slots=2, context_length=80)
    engine = make_engine(tiny_config, draft, **options)
    found = complete(engine, *wanted)
    assert_same(found, complete(make_engine(tiny_config, **options), *(replace(r, speculate="off") for r in wanted)))
    assert engine.load.num_preemptions > 0
    assert engine.load.num_accepted_tokens > 0
    assert engine.load.num_held_blocks == 0


def test_a_long_prompt_is_read_in_steps(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(max_position_embeddings=1024)
    draft = make_draft(config, num_slots=1, context_length=1024)
    engine = make_engine(config, draft, context_length=1024)
    (sequence,) = complete(engine, Request(prompts(700)[0], GREEDY, max_new_tokens=20))
    assert sequence.num_accepted_tokens > 10


def test_ctrl_c_while_it_writes_leaves_everything_as_it_was(tiny_config: ModelConfig) -> None:
    draft = make_draft(tiny_config)
    engine = make_engine(tiny_config, draft)
    sequence = engine.add(Request(prompts(40)[0], Sampler(seed=2), max_new_tokens=30))
    step, num_calls = draft._decoder.step, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls in {2, 5, 19, 30}:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    draft._decoder.step = interrupted
    num_interrupts = 0
    while engine.has_work:
        try:
            engine.step()
        except KeyboardInterrupt:
            num_interrupts += 1
    assert num_interrupts == 4
    (calm,) = complete(make_engine(tiny_config), Request(prompts(40)[0], Sampler(seed=2), max_new_tokens=30))
    assert sequence.new_ids == calm.new_ids
    assert engine.load.num_held_blocks == 0


def test_requests_may_choose(tiny_config: ModelConfig) -> None:
    draft = make_draft(tiny_config)
    engine = make_engine(tiny_config, draft)
    request = Request(prompts(40)[0], GREEDY, max_new_tokens=10)
    complete(engine, replace(request, speculate="off"), replace(request, speculate="ngram"))
    assert decoder_of(draft).num_rows == 0
    complete(engine, replace(request, speculate="draft"))
    assert decoder_of(draft).num_rows > 0
    with pytest.raises(EngineError, match='speculate "draft" needs a draft model'):
        make_engine(tiny_config).add(replace(request, speculate="draft"))


def write_model(path: Path, config: ModelConfig, vocab_size: int = 0) -> Path:
    words = vocabulary(vocab_size or config.vocab_size)
    write_gguf_model(path, config, random_entries(config, "Q4_0"), words)
    return path


def test_two_files_with_one_vocabulary(tiny_config: ModelConfig, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_config)
    smaller = write_model(tmp_path / "draft.gguf", tiny_config.replace(num_hidden_layers=1))
    settings: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 12}
    ids = np.random.default_rng(1).integers(3, 250, 40).tolist()
    with minicpm.load(path) as plain, minicpm.load(path, draft=smaller, context_length=128) as model:
        (expected,) = plain.generate([ids], speculate="off", **settings)
        (found,) = model.generate([ids], speculate="draft", **settings)
        assert found.token_ids == expected.token_ids
    other = write_model(tmp_path / "other.gguf", tiny_config.replace(vocab_size=340))
    with pytest.raises(EngineError, match="it needs the same vocabulary"):
        minicpm.load(path, draft=other)
