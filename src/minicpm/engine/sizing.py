"""How long a context and how large a KV cache this machine can hold, decided before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from minicpm.architecture import ModelConfig
from minicpm.errors import EngineError

# What a person does not ask for leaves half of the free memory to others.
_DEFAULT_SHARE = 0.5
_SMALLEST_DEFAULT_CONTEXT = 512
# How keys and values may be kept: the bytes of one value, and of the scale that a head's values of one position share.
_KV_TYPES = {"f16": (2, 0), "bf16": (2, 0), "f32": (4, 0), "q8": (1, 4)}


@dataclass(frozen=True, slots=True)
class CacheSize:
    """A context of `context_length` tokens over `num_blocks` blocks that all sequences share."""

    context_length: int
    num_blocks: int


def plan_cache(
    config: ModelConfig,
    *,
    context_length: int | None,
    max_parallel: int,
    kv_cache_tokens: int | None,
    block_tokens: int,
    kv_type: str,
    free_bytes: int,
) -> CacheSize:
    """Return the sizes asked for, or the largest useful ones that fit.

    Args:
        config: the model's.
        context_length: the longest sequence; None is what the model was trained on, or as much of it as fits.
        max_parallel: sequences that run at once; the cache holds a whole context of each, or as many as fit.
        kv_cache_tokens: the tokens of all sequences together, when the person knows better.
        block_tokens: positions per block.
        kv_type: how keys and values are kept, as in `Decoder`.
        free_bytes: what memory is left once the weights are loaded.

    Raises:
        EngineError: it does not fit the memory or the model; with both numbers.
    """
    longest = longest_context(config)
    if context_length is not None and not 1 <= context_length <= longest:
        raise EngineError(f"context_length must be 1 to {longest}, what the model was made for, got {context_length}")
    if max_parallel < 1:
        raise EngineError(f"max_parallel must be at least 1, got {max_parallel}")
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * _head_bytes(config, kv_type)
    default_tokens = int(max(free_bytes, 0) * _DEFAULT_SHARE) // token_bytes
    if context_length is None:
        context_length = min(config.max_position_embeddings, kv_cache_tokens or default_tokens)
        if context_length < min(_SMALLEST_DEFAULT_CONTEXT, config.max_position_embeddings) and not kv_cache_tokens:
            raise EngineError(
                f"{_megabytes(free_bytes)} of memory are left for keys and values, and "
                f"{_SMALLEST_DEFAULT_CONTEXT} tokens take {_megabytes(_SMALLEST_DEFAULT_CONTEXT * token_bytes)}; free "
                "some, or give a context_length"
            )
    if kv_cache_tokens is not None and kv_cache_tokens < context_length:
        raise EngineError(f"kv_cache_tokens must be at least the context of {context_length}, got {kv_cache_tokens}")
    tokens = kv_cache_tokens or max(context_length, min(context_length * max_parallel, default_tokens))
    num_blocks = -(-tokens // block_tokens)
    needed = num_blocks * block_tokens * token_bytes
    if needed > free_bytes:
        raise EngineError(
            f"a KV cache of {tokens} tokens takes {_megabytes(needed)} and {_megabytes(max(free_bytes, 0))} are left; "
            "give a smaller context_length or kv_cache_tokens"
        )
    return CacheSize(context_length, num_blocks)


def kv_value_bytes(config: ModelConfig, kv_type: str) -> float:
    """Return the bytes that a key's or value's number takes in the cache, with its share of padding and of a scale.

    Raises:
        EngineError: an unknown `kv_type`.
    """
    return _head_bytes(config, kv_type) / config.head_dim


def _head_bytes(config: ModelConfig, kv_type: str) -> int:
    if kv_type not in _KV_TYPES:
        raise EngineError(f"kv_type {kv_type!r} is unknown; known: {', '.join(_KV_TYPES)}")
    value_bytes, scale_bytes = _KV_TYPES[kv_type]
    # The decoder keeps each head at a multiple of 16 values.
    return -(-config.head_dim // 16) * 16 * value_bytes + scale_bytes


def longest_context(config: ModelConfig) -> int:
    """The longest sequence that may be asked for: what the model was trained on, or its `dynamic` scaling reaches."""
    scaling = config.rope_scaling
    factor = scaling.factor if scaling and scaling.rope_type == "dynamic" else 1
    return int(config.max_position_embeddings * factor)


def check_weights(weight_bytes: int, free_bytes: int) -> None:
    """Return when the weights fit the memory.

    Raises:
        EngineError: with both numbers.
    """
    if weight_bytes > free_bytes:
        raise EngineError(
            f"the weights take {_megabytes(weight_bytes)} and {_megabytes(free_bytes)} of memory are free; "
            "free some, or take a smaller or more coarsely quantized model"
        )


def free_memory() -> int:
    """Return the bytes that this process may still take: the machine's, or its control group's if those are fewer."""
    free = _machine_memory()
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            allowed, used = Path(limit).read_text().strip(), int(Path(usage).read_text())
        except (OSError, ValueError):
            continue
        if allowed.isdigit():
            free = min(free, int(allowed) - used + _reclaimable_bytes(Path(usage).parent))
    return free


def _machine_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Where the kernel does not tell what is available (macOS), all of it counts.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reclaimable_bytes(group: Path) -> int:
    """The bytes of file pages in the use of a control group, which the kernel gives up first (a model file's too)."""
    try:
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
    except (OSError, ValueError):
        return 0


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
