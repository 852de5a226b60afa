"""Memory does not grow with the number of requests."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.reference import random_weights
from tests.unit.engine.tiny import tiny_tokenizer

from minicpm.architecture import ModelConfig
from minicpm.engine import Engine, LanguageModel, Limits
from minicpm.engine.decoder import Decoder
from minicpm.errors import EngineError
from minicpm.formats.weight import Weight

NUM_BLOCKS = 24
NUM_WARM = 1_000
NUM_REQUESTS = 10_000
# The library `tokenizers` remembers the ids of so many texts, about 3 kB each, and then no more.
NUM_REMEMBERED = 10_000
# Measured 0.2 to 0.35 MB, and 0.03 to 0.07 MB in each further 10,000 requests.
ALLOWED_GROWTH_BYTES = 1 << 20


def resident_bytes() -> int:
    """Bytes of this process that are in memory now, after a collection."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def tiny_model(config: ModelConfig) -> LanguageModel:
    """A quantized model on the native decoder, with fewer blocks than its sequences would like."""
    weights = {
        name: Weight.from_array(array, "Q4_0" if array.ndim == 2 else "F32")
        for name, array in random_weights(config).items()
    }
    tokenizer = tiny_tokenizer(config.vocab_size)
    decoder = Decoder(config, weights, num_threads=2, num_blocks=NUM_BLOCKS)
    engine = Engine(
        decoder,
        config,
        num_blocks=NUM_BLOCKS,
        context_length=256,
        limits=Limits(max_parallel=16, max_step_tokens=256),
        tokenizer=tokenizer,
    )
    return LanguageModel(engine, tokenizer)


class Callers:
    """What people ask of a model, in turn; each method is a few requests and returns how many."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.generator = np.random.default_rng(0)

    def prompts(self, count: int) -> list[str]:
        """Texts of 1 to 150 characters, of which some share their beginning, and some have more than one block."""
        shared = "To be or not to be, that is the question. " * 3
        lengths = self.generator.integers(1, 150, count).tolist()
        letters = ["".join(self.generator.choice(list("etaoin shrdlu"), length)) for length in lengths]
        return [(shared[: len(text) // 2] + text)[:150] if len(text) % 3 == 0 else text for text in letters]

    def plain(self) -> int:
        return len(self.model.generate(self.prompts(24), max_new_tokens=6, temperature=0.0))

    def sampled(self) -> int:
        settings = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.2}
        return len(self.model.generate(self.prompts(20), max_new_tokens=8, logprobs=2, stop=["e", "the"], **settings))

    def chats(self) -> int:
        _, history = self.model.chat("Hello", max_new_tokens=5, seed=1)
        self.model.chat("Go on.", history, max_new_tokens=5)
        return 2

    def abandoned(self) -> int:
        for prompt in self.prompts(4):
            with self.model.continue_text(prompt, max_new_tokens=50, temperature=1.0) as stream:
                next(stream, None)
        return 4

    def long(self) -> int:
        return len(self.model.generate(self.prompts(16), max_new_tokens=80, temperature=1.0))

    def numbers(self) -> int:
        self.model.logprobs(self.prompts(1)[0], top=3)
        self.model.next_logprobs(self.prompts(1)[0])
        return 2 + len(self.model.embed(self.prompts(6)))

    def refused(self) -> int:
        with pytest.raises(EngineError):
            self.model.generate("e" * 300)
        return 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux' /proc")
def test_ten_thousand_mixed_requests_leave_memory_flat(tiny_config: ModelConfig) -> None:
    model = tiny_model(tiny_config.replace(num_hidden_layers=2))
    for i in range(NUM_REMEMBERED + 1):
        model.tokenizer.encode(str(i))
    callers = Callers(model)
    often: list[Callable[[], int]] = [
        callers.plain,
        callers.sampled,
        callers.chats,
        callers.abandoned,
        callers.numbers,
        callers.refused,
    ]

    def serve(count: int) -> int:
        num_done = 0
        while num_done < count:
            num_done += sum(kind() for kind in often * 4) + callers.long()
        return num_done

    serve(NUM_WARM)
    before = resident_bytes()
    num_done = serve(NUM_REQUESTS)
    growth = resident_bytes() - before
    load = model.engine.load
    assert (load.num_running, load.num_waiting, load.num_held_blocks) == (0, 0, 0)
    assert load.num_preemptions > 0, "the requests were to outgrow the cache"
    assert growth < ALLOWED_GROWTH_BYTES, f"{growth} bytes more after {num_done} requests"
