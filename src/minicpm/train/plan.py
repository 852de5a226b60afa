"""What a run takes before it begins: bytes by component, time, and the micro-batch that fits.

The bytes follow from the shapes of what the loop keeps at its fullest moment, the end of the forward pass; a test
compares the sum with the measured peak. What this leaves out: tuning (`tune_plan`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError
from minicpm.train.flops import flops_per_token
from minicpm.train.fused import QUERY_BLOCK
from minicpm.train.losses import chunk_rows
from minicpm.train.optim import OptimizerConfig
from minicpm.train.schedule import ScheduleConfig
from minicpm.train.settings import BatchConfig, LoopConfig

# Tokens of a micro-batch beyond which products are no faster.
ENOUGH_TOKENS = 8192
# Share of the rate of a plain product that a step reaches, and the width at which it is half of that: measured.
_COMPILED_SHARE, _PLAIN_SHARE, _HALF_WIDTH = 0.78, 0.62, 80
# The interpreter with torch, and what the compiler leaves in the process: measured.
_PROCESS_BYTES, _COMPILER_BYTES, _WIDENING_BYTES = 370 << 20, 90 << 20, 60 << 20
# What the allocator cannot use again between activations that stay, as a share of them; with uncompiled layers also
# between gradients, in bytes a parameter: measured.
HOLES_SHARE, _PLAIN_HOLES_PARAMETER = 1 / 4, 5
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True)
class Plan:
    """A run's cost: bytes by component, the rows of a forward pass, and the expected time.

    `tokens_per_second` and `seconds` are 0 where no peak was measured.
    """

    components: dict[str, int]
    micro_sequences: int
    is_compiled: bool
    flops_per_token: float
    total_tokens: int
    tokens_per_second: float
    checkpoint_bytes: int

    @property
    def total_bytes(self) -> int:
        """The expected peak."""
        return sum(self.components.values())

    @property
    def seconds(self) -> float:
        """The expected time of the whole run."""
        return self.total_tokens / self.tokens_per_second if self.tokens_per_second else 0.0


def make_plan(
    model: ModelConfig,
    schedule: ScheduleConfig,
    batch: BatchConfig,
    optimizer: OptimizerConfig,
    loop: LoopConfig,
    *,
    is_compiled: bool,
    is_widened: bool = False,
    memory_bytes: int = 0,
    peak_flops: float = 0.0,
    world: int = 1,
) -> Plan:
    """Return the plan of a run; `memory_bytes` bounds the micro-batch where the configuration leaves it open.

    Raises:
        ConfigError: not even one row fits into `memory_bytes`, with what is largest and what makes it smaller.
    """

    def components(rows: int) -> dict[str, int]:
        fixed = state_bytes(model, optimizer, loop.dtype)
        return {**fixed, **moving_bytes(model, loop, rows, batch.sequence_length, is_compiled, is_widened)}

    most = max(batch.sequences) // world or 1
    rows = batch.micro_sequences or max(1, min(most, ENOUGH_TOKENS // batch.sequence_length))
    rows = min(rows, most)
    while memory_bytes and not batch.micro_sequences and rows > 1 and sum(components(rows).values()) > memory_bytes:
        rows //= 2
    found = components(rows)
    if memory_bytes and sum(found.values()) > memory_bytes:
        largest = max(found, key=lambda name: found[name])
        raise ConfigError(
            f"the run takes {size(sum(found.values()))} and {size(memory_bytes)} are given; most is {largest} with "
            f"{size(found[largest])}; try loop.recompute_every=1, optimizer.states=int8 or batch.micro_sequences=1"
        )
    per_token = flops_per_token(model, batch.sequence_length)
    share = plain_share(model) * (_COMPILED_SHARE / _PLAIN_SHARE if is_compiled else 1)
    counts = model.num_parameters().total
    return Plan(
        components=found,
        micro_sequences=rows,
        is_compiled=is_compiled,
        flops_per_token=per_token,
        total_tokens=batch.tokens_through(schedule.total_steps),
        tokens_per_second=share * peak_flops / per_token,
        checkpoint_bytes=sum(state_bytes(model, optimizer, loop.dtype).values()) - 4 * counts,
    )


def plain_share(model: ModelConfig) -> float:
    """Return the share of the rate of a plain product that a step with uncompiled layers reaches."""
    return _PLAIN_SHARE * model.hidden_size / (model.hidden_size + _HALF_WIDTH)


def state_bytes(model: ModelConfig, optimizer: OptimizerConfig, dtype: str) -> dict[str, int]:
    """Return the bytes that do not depend on the batch: weights, masters, gradients, moments."""
    count = model.num_parameters().total
    is_half = dtype != "float32"
    return {
        "weights": count * (2 if is_half else 4),
        **({"masters": 4 * count} if is_half else {}),
        "gradients": 4 * count,
        # One byte and a 256th of a float32 scale for each moment.
        "moments": 8 * count if optimizer.states == "float32" else 2 * count + count // 32,
    }


def moving_bytes(
    model: ModelConfig, loop: LoopConfig, rows: int, sequence_length: int, is_compiled: bool, is_widened: bool
) -> dict[str, int]:
    """Return the bytes of activations, logits and working space of a micro-batch of `rows`."""
    width = 4 if loop.dtype == "float32" else 2
    tokens = rows * sequence_length
    layer = tokens * layer_bytes(model, sequence_length, width, is_compiled)
    stream = tokens * model.hidden_size * width
    layers = model.num_hidden_layers
    again = -(-layers // loop.recompute_every) if loop.recompute_every else 0
    kept = (layers - again) * layer + again * stream + (layer if again else 0) + 4 * stream
    # Logits, their float32 copy, log-probabilities, and the slope of the chunk before; compiled code has no copy.
    value = 10 if width == 2 and is_compiled and not is_widened else 12
    chunk = min(chunk_rows(model.vocab_size), tokens) * model.vocab_size * value
    # One layer's backward pass comes when the chunks are gone: scores, weights and their slope of a block of queries.
    block = rows * model.num_attention_heads * min(QUERY_BLOCK, sequence_length) * sequence_length
    backward = block * 12 + 16 * tokens * model.query_size + 3 * tokens * model.intermediate_size * width
    # Factors in float32 beside what is kept.
    wide = 2 * layer if is_widened else 0
    holes = int(kept * HOLES_SHARE) + (0 if is_compiled else _PLAIN_HOLES_PARAMETER * model.num_parameters().total)
    return {
        "activations": kept,
        "logits": chunk,
        "working space": max(backward - chunk, 0) + wide + model.vocab_size * model.hidden_size * (4 + width),
        "allocator": holes,
        "process": _PROCESS_BYTES + (_COMPILER_BYTES if is_compiled else 0) + (_WIDENING_BYTES if is_widened else 0),
    }


def layer_bytes(model: ModelConfig, sequence_length: int, width: int, is_compiled: bool) -> int:
    """Return the bytes that one layer keeps of one token for its backward pass, as autograd's hooks counted them.

    Compiled: the stream and four of its size, q, k, v (of all heads) and the attention's output, gate, up and their
    product, two float32 norms. Otherwise also the normed input in float32, silu's result, and the layer's own mask.
    """
    hidden, query, kv, inner = model.hidden_size, model.query_size, model.kv_size, model.intermediate_size
    if is_compiled:
        return (5 * hidden + 4 * query + 3 * inner) * width + 8
    mask = sequence_length * width
    return (5 * hidden + 2 * query + 2 * kv + 4 * inner) * width + 8 * hidden + 4 * model.num_attention_heads + 8 + mask


def available_bytes() -> int:
    """Return the memory that a run may take on this machine: four fifths of what is free, 0 where that is unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            facts = dict(line.split(":", 1) for line in file)
        return int(facts["MemAvailable"].split()[0]) * 1024 * 4 // 5
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 4 // 5 if hasattr(os, "sysconf") else 0


def parse_bytes(text: str) -> int:
    """Return the bytes that "8GB", "500 MiB" or "24gb" means.

    Raises:
        ConfigError: it is no size.
    """
    compact = text.strip().lower().replace(" ", "")
    number = compact.rstrip("bikmg")
    try:
        return round(float(number) * _UNITS[compact[len(number) :] or "b"])
    except (ValueError, KeyError):
        raise ConfigError(f"{text!r} is no size; write it like 8GB or 500MiB") from None


def size(count: int) -> str:
    """Return "1.23 GB", "45.6 MB" or "789 kB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1000:.0f} kB"
