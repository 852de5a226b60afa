"""`minicpm plan CONFIG`: what a run takes, before it begins."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm import config as configuration
from minicpm.cli.parser import Parser
from minicpm.cli.run_options import add_memory, memory_of, show_plan
from minicpm.cli.terminal import note, out, suggest


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "plan",
        "Say what a pretraining run takes: bytes by component, tokens a second and hours on this machine, and the rows "
        "that fit at once. Reads no text and builds no model.",
        examples=["minicpm plan configs/nano.toml", "minicpm plan configs/minicpm-1b.toml --memory 24GB --batch 2.6"],
    )
    verb.add_argument("config", metavar="CONFIG", type=Path, help="a TOML file")
    verb.add_argument("overrides", metavar="FIELD=VALUE", nargs="*", help="such as batch.sequence_length=1024")
    verb.add_argument(
        "--batch", type=float, default=None, metavar="LOSS", help="also the best batch for a model of this C4 loss"
    )
    add_memory(verb)
    return verb


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    from minicpm.train.arithmetic import choose_arithmetic, choose_device
    from minicpm.train.plan import make_plan
    from minicpm.train.pretrain_config import PretrainConfig
    from minicpm.train.schedule import critical_batch_tokens, stage_bounds

    config = configuration.load(PretrainConfig, options.config, options.overrides)
    device = choose_device(config.loop.device)
    counts = config.model.num_parameters()
    arithmetic = choose_arithmetic(config.loop, config.schedule.total_steps, device, note)
    plan = make_plan(
        config.model, config.schedule, config.batch, config.optimizer, config.loop,
        is_compiled=arithmetic.is_compiled, is_widened=arithmetic.is_widened,
        memory_bytes=memory_of(options), peak_flops=arithmetic.peak_flops,
    )  # fmt: skip
    out(f"{config.name}: {counts.total:,} parameters ({counts.non_embedding:,} without embedding)")
    for name, first, last in stage_bounds(config.schedule):
        out(f"  {name:7} steps {first:,}–{last:,}")
    show_plan(plan)
    if options.batch is not None:
        tokens = critical_batch_tokens(options.batch)
        rows = max(round(tokens / config.batch.sequence_length), 1)
        out(
            f"batch law at loss {options.batch:g}: {tokens:,.0f} tokens, "
            f"{rows:,} rows of {config.batch.sequence_length}"
        )
    suggest(f"minicpm pretrain {options.config}")
