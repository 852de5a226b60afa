"""What a tuning run takes before it begins, by method; and the settings with which it fits.

The bytes follow from the shapes of what is kept at the fullest moment; `bench/memory.py` compares them with measured
peaks. What this leaves out: cards (`cards`).
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError
from minicpm.formats.blocks import block_type
from minicpm.formats.checkpoint import Checkpoint
from minicpm.model.loading import FLOAT_TYPES
from minicpm.model.lora import PROJECTIONS
from minicpm.train.flops import flops_per_token
from minicpm.train.lean_optim import CHUNK
from minicpm.train.plan import ENOUGH_TOKENS, HOLES_SHARE, Plan, moving_bytes, plain_share, size, state_bytes
from minicpm.train.tune_config import TuneConfig

# Nobody computes more at once.
_MOST_ROWS = 4096


@dataclass(frozen=True)
class Base:
    """What a plan knows of the model that is tuned: its shape, and the bytes of projections that are blocks already."""

    model: ModelConfig
    block_bytes: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Base:
        """Return what an open model says; its weights are not read."""
        kept = {n: e for n, e in checkpoint.weights.entries.items() if n.split(".")[-2] in PROJECTIONS}
        is_blocks = all(entry.block_type not in FLOAT_TYPES for entry in kept.values())
        return cls(checkpoint.config, sum(entry.num_bytes for entry in kept.values()) if is_blocks else 0)


def tune_bytes(
    base: Base, config: TuneConfig, rows: int, *, is_compiled: bool = False, is_widened: bool = False
) -> dict[str, int]:
    """Return the bytes by component of a run with micro-batches of `rows`."""
    model = base.model
    width = 4 if config.loop.dtype == "float32" else 2
    length = config.batch.sequence_length
    # A pair is two rows.
    rows_at_once = rows * (2 if config.goal == "dpo" and config.preference.loss != "kto" else 1)
    moving = moving_bytes(model, config.loop, rows_at_once, length, is_compiled, is_widened)
    # Without the gradients' holes: frozen weights have none, and fused updates free each at once. Measured at 2.7 B.
    moving["allocator"] = int(moving["activations"] * HOLES_SHARE)
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
            "weights": base.block_bytes or counts.linear * kind.block_bytes // kind.block_size,
            "other weights": width * (counts.total - counts.linear),
        }
        # One decoded projection.
        moving["working space"] += model.hidden_size * model.intermediate_size * width
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
    base: Base,
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
    model, length, most = base.model, config.batch.sequence_length, max(config.batch.sequences)

    def found_for(rows: int) -> dict[str, int]:
        return tune_bytes(base, config, rows, is_compiled=is_compiled, is_widened=is_widened)

    rows = config.batch.micro_sequences or max(1, min(most, ENOUGH_TOKENS // length))
    rows = most if config.optimizer.is_fused else min(rows, most)
    is_open = not config.batch.micro_sequences and not config.optimizer.is_fused
    while memory_bytes and is_open and rows > 1 and sum(found_for(rows).values()) > memory_bytes:
        rows //= 2
    found = found_for(rows)
    if memory_bytes and sum(found.values()) > memory_bytes:
        fitting = first_fitting(base, config, memory_bytes)
        hint = f"with {fitting[0]} it fits" if fitting else "nothing here makes it fit: shorten the rows, or take qlora"
        raise ConfigError(
            f"the run takes {size(sum(found.values()))} and {size(memory_bytes)} are given; {hint} (see `minicpm plan`)"
        )
    per_token = flops_per_token(model, length)
    adapters = adapter_parameters(model, config)
    saved = 12 * adapters if config.method != "full" else sum(_full_bytes(model, config, 2).values())
    return Plan(
        components=found,
        micro_sequences=rows,
        is_compiled=is_compiled,
        flops_per_token=per_token,
        total_tokens=config.batch.tokens_through(config.schedule.total_steps),
        tokens_per_second=plain_share(model) * peak_flops / (per_token * passes(config) / 3),
        checkpoint_bytes=saved,
    )


def passes(config: TuneConfig) -> float:
    """Return in how many products a weight takes part: forward, backward, its own slope, and forward once more.

    `flops_per_token` counts the first three. Frozen weights have no slope of their own.
    """
    again = 1 / config.loop.recompute_every if config.loop.recompute_every else 0.0
    return (3 if config.method == "full" else 2) + again


def first_fitting(base: Base, config: TuneConfig, memory_bytes: int) -> tuple[str, TuneConfig] | None:
    """Return the first of `leaner` whose single row fits, as the words of a command line and as a configuration."""
    return next((f for f in leaner(config) if sum(tune_bytes(base, f[1], 1).values()) <= memory_bytes), None)


def most_at_once(base: Base, config: TuneConfig, memory_bytes: int) -> tuple[int, int]:
    """Return the most rows of the configured length in one micro-batch, and the tokens of the longest single row.

    Both are 0 where not even one row fits; no row is longer than the model's positions.
    """

    def largest(fits: Callable[[int], bool], most: int) -> int:
        # The bytes only grow.
        return bisect.bisect_left(range(1, most + 1), True, key=lambda count: not fits(count))

    def of_length(length: int) -> TuneConfig:
        return dataclasses.replace(config, batch=dataclasses.replace(config.batch, sequence_length=length))

    rows = largest(lambda rows: sum(tune_bytes(base, config, rows).values()) <= memory_bytes, _MOST_ROWS)
    length = largest(
        lambda length: sum(tune_bytes(base, of_length(length + 1), 1).values()) <= memory_bytes,
        base.model.max_position_embeddings - 1,
    )
    return rows, length + 1 if length else 0


def leaner(config: TuneConfig) -> Iterator[tuple[str, TuneConfig]]:
    """Yield settings that take less and less memory, each as the words of a command line and as a configuration.

    The first is the configuration with its micro-batch left open; no words where it is so already.
    """
    words: list[str] = []

    def step(section: str, **changes: object) -> tuple[str, TuneConfig]:
        nonlocal config
        part = dataclasses.replace(getattr(config, section), **changes)
        if part != getattr(config, section):
            words.extend(f"{section}.{name}={str(value).lower()}" for name, value in changes.items())
        config = dataclasses.replace(config, **{section: part})
        return " ".join(words), config

    yield step("batch", micro_sequences=0)
    yield step("loop", recompute_every=1)
    if config.method == "full":
        yield step("optimizer", states="int8")
        if config.loop.dtype == "bfloat16":
            yield step("optimizer", masters="none")
            step("batch", sequences=(1,))
            words = [word.replace("(1,)", "[1]") for word in words]
            yield step("optimizer", is_fused=True)
            yield step("optimizer", states="factored")
