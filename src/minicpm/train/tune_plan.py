"""What a tuning run takes before it begins, by method; and the settings with which it fits.

The bytes follow from the shapes of what is kept at the fullest moment; `bench/memory.py` compares them with measured
peaks. What this leaves out: speed on machines that are not at hand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError
from minicpm.formats.blocks import block_type
from minicpm.train.flops import flops_per_token
from minicpm.train.lean_optim import CHUNK
from minicpm.train.plan import ENOUGH_TOKENS, Plan, moving_bytes, plain_share, size, state_bytes
from minicpm.train.tune_config import TuneConfig

# Memory of cards by name, as their makers say; what a program may use of it is less, for the driver and the screen.
GPU_BYTES = {
    "1060": 6 << 30, "1070": 8 << 30, "1080": 8 << 30, "1080ti": 11 << 30, "2060": 6 << 30, "2070": 8 << 30,
    "2080": 8 << 30, "2080ti": 11 << 30, "3060": 12 << 30, "3080": 10 << 30, "3090": 24 << 30, "4060": 8 << 30,
    "4070": 12 << 30, "4080": 16 << 30, "4090": 24 << 30, "5090": 32 << 30, "t4": 16 << 30, "v100": 32 << 30,
    "a100": 80 << 30, "h100": 80 << 30,
}  # fmt: skip
GPU_USABLE = 0.94
# They multiply float16 fast and bfloat16 not at all, or slowly.
WITHOUT_BFLOAT16 = frozenset({"1060", "1070", "1080", "1080ti", "2060", "2070", "2080", "2080ti", "t4", "v100"})


def tune_bytes(
    model: ModelConfig, config: TuneConfig, rows: int, *, is_compiled: bool = False, is_widened: bool = False
) -> dict[str, int]:
    """Return the bytes by component of a run with micro-batches of `rows`."""
    width = 4 if config.loop.dtype == "float32" else 2
    length = config.batch.sequence_length
    # A pair is two rows.
    rows_at_once = rows * (2 if config.goal == "dpo" and config.preference.loss != "kto" else 1)
    moving = moving_bytes(model, config.loop, rows_at_once, length, is_compiled, is_widened)
    head = model.vocab_size * model.hidden_size * (4 + width)
    if config.method == "full":
        fixed = _full_bytes(model, config, width)
        if config.optimizer.masters == "none":
            # Float32 pieces of a parameter, its moments, and the codes' places, while it moves.
            moving["working space"] += 12 * 4 * CHUNK
            # The embedding's second gradient, of the lookup.
            moving["working space"] += model.vocab_size * model.hidden_size * width
        return {**fixed, **moving}
    adapters = adapter_parameters(model, config)
    # No head is trained; every adapter keeps its input in float32.
    moving["working space"] = max(moving["working space"] - head, 0)
    inputs = 4 * (5 * model.hidden_size + model.query_size + model.intermediate_size) * rows_at_once * length
    layers = model.num_hidden_layers
    kept = layers - math.ceil(layers / config.loop.recompute_every) + 1 if config.loop.recompute_every else layers
    moving["activations"] += inputs * kept
    counts = model.num_parameters()
    if config.method == "lora":
        fixed = {"weights": width * counts.total}
    else:
        kind = block_type(config.block_type)
        fixed = {
            "weights": counts.linear * kind.block_bytes // kind.block_size,
            "other weights": width * (counts.total - counts.linear),
        }
        # One decoded projection: levels, float32 values, and what is multiplied.
        moving["working space"] += model.hidden_size * model.intermediate_size * (2 + 8 + width)
    return {**fixed, "adapters": 16 * adapters, **moving}


def _full_bytes(model: ModelConfig, config: TuneConfig, width: int) -> dict[str, int]:
    if config.optimizer.masters == "float32":
        return state_bytes(model, config.optimizer, config.loop.dtype)
    count = model.num_parameters().total
    moments = {"float32": 8 * count, "int8": 2 * count + count // 32, "factored": count // 256}
    fixed = {"weights": width * count, "moments": moments[config.optimizer.states]}
    return fixed if config.optimizer.is_fused else {**fixed, "gradients": 4 * count}


def adapter_parameters(model: ModelConfig, config: TuneConfig) -> int:
    """Return the numbers that the adapters have."""
    count = 0
    for name, shape in model.weight_shapes().items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and any(module == t or module.endswith("." + t) for t in config.lora.targets):
            count += config.lora.rank * sum(shape) + (shape[0] if config.lora.use_dora else 0)
    return count


def make_tune_plan(
    model: ModelConfig,
    config: TuneConfig,
    *,
    is_compiled: bool = False,
    is_widened: bool = False,
    memory_bytes: int = 0,
    peak_flops: float = 0.0,
) -> Plan:
    """Return the plan of a run; `memory_bytes` bounds the micro-batch where the configuration leaves it open.

    Raises:
        ConfigError: not even one row fits into `memory_bytes`; names the settings with which it would, if any do.
    """
    length, most = config.batch.sequence_length, max(config.batch.sequences)

    def found_for(rows: int) -> dict[str, int]:
        return tune_bytes(model, config, rows, is_compiled=is_compiled, is_widened=is_widened)

    rows = config.batch.micro_sequences or max(1, min(most, ENOUGH_TOKENS // length))
    rows = most if config.optimizer.is_fused else min(rows, most)
    is_open = not config.batch.micro_sequences and not config.optimizer.is_fused
    while memory_bytes and is_open and rows > 1 and sum(found_for(rows).values()) > memory_bytes:
        rows //= 2
    found = found_for(rows)
    if memory_bytes and sum(found.values()) > memory_bytes:
        flags = next(
            (flags for flags, tried in leaner(config) if sum(tune_bytes(model, tried, 1).values()) <= memory_bytes), ""
        )
        hint = f"with {flags} it fits" if flags else "nothing here makes it fit: shorten the rows, or take qlora"
        raise ConfigError(
            f"the run takes {size(sum(found.values()))} and {size(memory_bytes)} are given; {hint} (see `minicpm plan`)"
        )
    per_token = flops_per_token(model, length)
    rate = plain_share(model) * peak_flops / per_token
    adapters = adapter_parameters(model, config)
    saved = 12 * adapters if config.method != "full" else sum(_full_bytes(model, config, 2).values())
    return Plan(
        components=found,
        micro_sequences=rows,
        is_compiled=is_compiled,
        flops_per_token=per_token,
        total_tokens=config.batch.tokens_through(config.schedule.total_steps),
        tokens_per_second=rate,
        checkpoint_bytes=saved,
    )


def leaner(config: TuneConfig) -> Iterator[tuple[str, TuneConfig]]:
    """Yield settings that take less and less memory, each as the words of a command line and as a configuration."""
    words: list[str] = []

    def step(section: str, **changes: object) -> tuple[str, TuneConfig]:
        nonlocal config
        words.extend(f"{section}.{name}={str(value).lower()}" for name, value in changes.items())
        part = dataclasses.replace(getattr(config, section), **changes)
        config = dataclasses.replace(config, **{section: part})
        return " ".join(words), config

    yield step("batch", micro_sequences=0)
    yield step("loop", recompute_every=1)
    if config.method == "full":
        yield step("optimizer", states="int8")
        if config.loop.dtype == "bfloat16":
            yield step("optimizer", masters="none")
            step("batch", sequences=(1,))
            words[-1] = "batch.sequences=[1]"
            yield step("optimizer", is_fused=True)
            yield step("optimizer", states="factored")
