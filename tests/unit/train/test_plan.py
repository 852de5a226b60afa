"""The plan's arithmetic by hand, the micro-batch that fits, and the allocator's second start."""

from __future__ import annotations

import pytest

from minicpm.architecture import PRESETS, ModelConfig
from minicpm.errors import ConfigError
from minicpm.train.allocator import MARK, VARIABLE, tuned_environment
from minicpm.train.flops import flops_per_token
from minicpm.train.optim import OptimizerConfig
from minicpm.train.plan import Plan, make_plan, parse_bytes, size, state_bytes
from minicpm.train.schedule import ScheduleConfig
from minicpm.train.settings import BatchConfig, LoopConfig, Ranks

SCHEDULE = ScheduleConfig(total_steps=100)


def plan(model: ModelConfig, loop: LoopConfig | None = None, batch: BatchConfig | None = None, memory: int = 0) -> Plan:
    return make_plan(
        model, SCHEDULE, batch or BatchConfig(), OptimizerConfig(), loop or LoopConfig(),
        is_compiled=False, memory_bytes=memory, peak_flops=1e12,
    )  # fmt: skip


def test_states_of_the_2b() -> None:
    count = 2_724_880_896
    found = state_bytes(PRESETS["minicpm-2b"], OptimizerConfig(), "bfloat16")
    assert found == {"weights": 2 * count, "masters": 4 * count, "gradients": 4 * count, "moments": 8 * count}
    small = state_bytes(PRESETS["minicpm-2b"], OptimizerConfig(states="int8"), "float32")
    assert small["moments"] < 2.04 * count
    assert "masters" not in small


def test_flops_by_hand(tiny_config: ModelConfig) -> None:
    linear = 5 * (96 * (96 + 32 + 32) + 96 * 96 + 3 * 96 * 160)
    assert flops_per_token(tiny_config, 11) == 6 * (linear + 331 * 96) + 6 * 5 * 11 * 96


def test_micro_batch_shrinks_to_what_is_given() -> None:
    model = PRESETS["wind-30m"]
    roomy = plan(model)
    assert roomy.micro_sequences == 16
    tight = plan(model, memory=roomy.total_bytes - 1)
    assert tight.micro_sequences == 8
    assert tight.total_bytes < roomy.total_bytes
    with pytest.raises(ConfigError, match=r"the run takes .* and 1\.00 GB are given; most is"):
        plan(model, memory=10**9)
    assert plan(model, batch=BatchConfig(micro_sequences=2)).micro_sequences == 2
    assert roomy.total_tokens == 100 * 16 * 512
    assert roomy.seconds == pytest.approx(roomy.total_tokens / roomy.tokens_per_second)


def test_recomputing_saves_activations() -> None:
    model = PRESETS["wind-0.1b"]
    whole, half, all_layers = (plan(model, LoopConfig(recompute_every=n)).components["activations"] for n in (0, 2, 1))
    assert whole > half > all_layers


@pytest.mark.parametrize(
    ("text", "expected"), [("8GB", 8 * 10**9), ("500 MiB", 500 << 20), ("24gb", 24 * 10**9), ("1.5kb", 1500), ("7", 7)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_what_is_no_size() -> None:
    for text in ("", "GB", "8 potatoes", "1e"):
        with pytest.raises(ConfigError, match="is no size"):
            parse_bytes(text)
    assert [size(n) for n in (1500, 2_500_000, 3 * 10**9)] == ["2 kB", "2.50 MB", "3.00 GB"]


def test_allocator_is_set_once_and_a_persons_choice_is_kept() -> None:
    tuned = tuned_environment({"HOME": "/h"}, "glibc")
    assert tuned is not None
    assert "trim_threshold" in tuned[VARIABLE]
    assert tuned["HOME"] == "/h"
    assert tuned_environment(tuned, "glibc") is None
    assert tuned_environment({VARIABLE: "glibc.malloc.arena_max=1"}, "glibc") is None
    assert tuned_environment({MARK: "1"}, "glibc") is None
    assert tuned_environment({}, "") is None


def test_batch_ramp_counts_rows() -> None:
    batch = BatchConfig(sequences=(4, 8, 16), ramp_steps=3, sequence_length=10)
    seen = 0
    for step in range(1, 20):
        assert batch.sequences_before(step) == seen
        seen += batch.at(step)
        assert batch.tokens_through(step) == seen * 10
    assert [batch.at(s) for s in (3, 4, 7, 99)] == [4, 8, 16, 16]
    assert batch.split(7, 1, 2, 3) == [(8, 3), (11, 3), (14, 2)]
    with pytest.raises(ConfigError, match="cannot be dealt out to 3"):
        batch.split(7, 0, 3, 3)
    with pytest.raises(ConfigError, match="rank"):
        Ranks(2, 2)


def test_which_steps_are_saved() -> None:
    loop = LoopConfig(save_every=50)
    assert [s for s in range(1, 121) if loop.is_saved(s, 120)] == [1, 2, 4, 8, 16, 32, 50, 100, 120]
    assert [s for s in range(1, 121) if LoopConfig(save_every=50, saves_early=False).is_saved(s, 120)] == [50, 100, 120]
