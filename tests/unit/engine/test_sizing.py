"""How much context and cache a machine can hold, by hand-worked numbers."""

from __future__ import annotations

from typing import Any

import pytest

from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.engine.sizing import (
    CacheSize,
    check_weights,
    free_memory,
    kv_value_bytes,
    longest_context,
    plan_cache,
)
from minicpm.errors import EngineError

# 5 layers × 2 × 2 heads × 16 values × 2 bytes.
TOKEN_BYTES = 640
DEFAULTS: dict[str, Any] = {
    "context_length": None,
    "max_parallel": 4,
    "kv_cache_tokens": None,
    "block_tokens": 32,
    "kv_type": "f16",
    "free_bytes": 10**9,
}


def plan(config: ModelConfig, **changes: Any) -> CacheSize:
    return plan_cache(config, **DEFAULTS | changes)


def test_with_enough_memory_everyone_has_a_whole_context(tiny_config: ModelConfig) -> None:
    assert plan(tiny_config) == CacheSize(512, 4 * 512 // 32)
    assert plan(tiny_config, context_length=100) == CacheSize(100, 13)  # 400 tokens


def test_with_less_memory_the_cache_takes_half_of_it(tiny_config: ModelConfig) -> None:
    size = plan(tiny_config, free_bytes=2 * 1000 * TOKEN_BYTES)
    assert size == CacheSize(512, 32)  # 1000 tokens, in whole blocks


def test_a_context_that_is_not_asked_for_shrinks_to_what_fits(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(max_position_embeddings=131072)
    assert plan(config, free_bytes=2 * 6400 * TOKEN_BYTES) == CacheSize(6400, 200)
    with pytest.raises(EngineError, match=r"0 MB of memory are left .* 512 tokens take 0 MB"):
        plan(config, free_bytes=100 * TOKEN_BYTES)


def test_what_is_asked_for_must_fit(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(max_position_embeddings=131072)
    free = 20_000 * TOKEN_BYTES
    assert plan(config, context_length=20_000, free_bytes=free).context_length == 20_000
    with pytest.raises(EngineError, match="20001 tokens takes 13 MB and 13 MB are left"):
        plan(config, context_length=20_001, free_bytes=free)
    with pytest.raises(EngineError, match=r"40000 tokens takes 26 MB and 13 MB are left"):
        plan(config, context_length=100, kv_cache_tokens=40_000, free_bytes=free)
    with pytest.raises(EngineError, match="at least the context of 100, got 99"):
        plan(config, context_length=100, kv_cache_tokens=99)
    assert plan(config, context_length=100, kv_cache_tokens=100) == CacheSize(100, 4)


@pytest.mark.parametrize("context_length", [0, -1, 513, 1_000_000])
def test_a_context_beyond_the_model_is_refused_with_both_numbers(tiny_config: ModelConfig, context_length: int) -> None:
    with pytest.raises(EngineError, match=f"must be 1 to 512, .* got {context_length}"):
        plan(tiny_config, context_length=context_length)


def test_dynamic_scaling_reaches_further(tiny_config: ModelConfig) -> None:
    assert longest_context(tiny_config) == 512
    assert longest_context(tiny_config.replace(rope_scaling=RopeScaling("dynamic", 2.0))) == 1024
    assert longest_context(tiny_config.replace(rope_scaling=RopeScaling("linear", 2.0))) == 512


def test_heads_are_kept_at_multiples_of_16_values(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(head_dim=20, max_position_embeddings=131072)
    assert plan(config, free_bytes=2 * 1000 * 2 * TOKEN_BYTES).context_length == 1000


def test_kv_types_take_what_they_say(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(max_position_embeddings=131072)
    # Per head: 16 values of 4 bytes; of 1 byte and a scale of 4.
    for kv_type, head_bytes in (("bf16", 32), ("f32", 64), ("q8", 20)):
        assert kv_value_bytes(config, kv_type) == head_bytes / 16
        free_bytes = 2 * 6400 * TOKEN_BYTES * head_bytes // 32
        assert plan(config, kv_type=kv_type, free_bytes=free_bytes) == CacheSize(6400, 200)
    # Padding counts: 20 values are kept as 32.
    assert kv_value_bytes(config.replace(head_dim=20), "q8") == 36 / 20
    with pytest.raises(EngineError, match="kv_type 'q4' is unknown; known: f16, bf16, f32, q8"):
        plan(config, kv_type="q4")


def test_settings_out_of_range(tiny_config: ModelConfig) -> None:
    with pytest.raises(EngineError, match="max_parallel must be at least 1, got 0"):
        plan(tiny_config, max_parallel=0)
    check_weights(5_000_000, 5_000_000)
    with pytest.raises(EngineError, match="the weights take 5 MB and 4 MB of memory are free"):
        check_weights(5_000_000, 4_000_000)


def test_this_machine_has_some_memory() -> None:
    assert 1 << 20 < free_memory() < 1 << 50
