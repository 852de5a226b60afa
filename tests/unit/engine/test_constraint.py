"""Constraints: only allowed tokens come, a complete reply ends, and one that fails leaves the others alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from tests.unit.engine.tiny import complete, reference_engine, reference_model, run_all

from minicpm.architecture import ModelConfig
from minicpm.engine import Request, Sampler
from minicpm.engine.runner import Runner
from minicpm.errors import EngineError

GREEDY = Sampler(temperature=0)


class Cycle:
    """Allows 5, 7 or 9 first, then each time the next greater odd number up to 21."""

    def __init__(self) -> None:
        self.last: int | None = None

    def allowed(self) -> npt.NDArray[np.bool_]:
        allowed = np.zeros(331, np.bool_)
        allowed[[5, 7, 9] if self.last is None else [self.last + 2]] = True
        return allowed

    def accept(self, token_id: int) -> bool:
        self.last = token_id
        return token_id == 21


class Broken(Cycle):
    """Fails at the third token."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        if self.last is not None and self.last >= 9:
            raise EngineError("too costly")
        return super().allowed()


@pytest.mark.parametrize("speculate", ["ngram", "off"])
@pytest.mark.parametrize(
    "sampler",
    [
        GREEDY,
        Sampler(temperature=2, seed=1),
        Sampler(temperature=2, top_k=40, seed=1),
        Sampler(temperature=2, top_p=0.5, min_p=0.1, seed=1),
        Sampler(temperature=0, repetition_penalty=1.3, frequency_penalty=1, logit_bias={0: 50.0, 7: 9.0}),
    ],
)
def test_only_allowed_tokens_come(tiny_config: ModelConfig, sampler: Sampler, speculate: str) -> None:
    engine, _ = reference_engine(tiny_config)
    # What the prompt repeats is drafted, and is not allowed at all times.
    prompt = [5, 7, 9, 11, 13, 15, 4, 5, 7, 9, 11, 13, 15, 17, 19, 21, 4] * 2
    request = Request(prompt, sampler, max_new_tokens=30, constraint=Cycle, speculate=speculate, logprobs=0)
    twice = complete(engine, request, request)
    for sequence in twice:
        first = sequence.new_ids[0]
        assert first in (5, 7, 9)
        assert sequence.new_ids == list(range(first, 22, 2))
        assert sequence.finish_reason == "stop"
        assert len(sequence.logprobs) == len(sequence.new_ids)


def test_a_reply_that_fails_leaves_the_others_alone(tiny_config: ModelConfig) -> None:
    engine, _ = reference_engine(tiny_config)
    (alone,) = complete(engine, Request([1, 2, 3], GREEDY, max_new_tokens=12))
    broken = engine.add(Request([1, 2, 3], GREEDY, constraint=Broken))
    other = engine.add(Request([1, 2, 3], GREEDY, max_new_tokens=12))
    events = list(run_all(engine))
    assert broken.finish_reason == "failed"
    assert [event.finish_reason for event in events if event.sequence is broken][-1] == "failed"
    assert str(broken.error) == "too costly"
    assert other.new_ids == alone.new_ids
    assert engine.load.num_held_blocks == engine.load.num_running == 0


def test_whoever_waits_for_a_reply_that_fails_is_told(tiny_config: ModelConfig) -> None:
    model = reference_model(tiny_config)
    runner = Runner(model.engine)
    request = Request([1, 2, 3], GREEDY, constraint=Broken)
    with pytest.raises(EngineError, match="too costly"):
        runner.run([request])
    sequence = runner.start(request)
    with pytest.raises(EngineError, match="too costly"):
        list(iter(lambda: runner.next_event(sequence), None))
