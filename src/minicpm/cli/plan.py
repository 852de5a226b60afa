"""`minicpm plan CONFIG` and `minicpm plan MODEL`: what a run takes, before it begins."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm import config as configuration
from minicpm.cli.parser import Parser
from minicpm.cli.run_options import add_memory, memory_of, show_plan
from minicpm.cli.terminal import note, out, suggest
from minicpm.cli.tuning import METHODS
from minicpm.errors import ConfigError


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "plan",
        "Say what a run takes: of pretraining (CONFIG, a TOML file) bytes by component, tokens a second and hours; of "
        "tuning (MODEL) whether it fits, how many rows of which length, how long a step takes, and the settings that "
        "make it fit. Reads no text, loads no weights. Exit code 1 where the one --method does not fit.",
        examples=[
            "minicpm plan configs/nano.toml",
            "minicpm plan configs/minicpm-1b.toml --memory 24GB --batch 2.6",
            "minicpm plan minicpm-2b --gpu 3090",
            "minicpm plan model.gguf --method qlora --gpu 1080 batch.sequence_length=1024",
        ],
    )
    verb.add_argument("target", metavar="CONFIG | MODEL", help="a TOML file, or what `minicpm sft` takes, a preset's "
                      "name (minicpm-2b, minicpm-1b), or a config.json")  # fmt: skip
    verb.add_argument("overrides", metavar="FIELD=VALUE", nargs="*", help="such as batch.sequence_length=1024")
    verb.add_argument(
        "--batch", type=float, default=None, metavar="LOSS", help="also the best batch for a model of this C4 loss"
    )
    verb.add_argument("--method", choices=METHODS, default=None, help="of tuning (default: one line for each)")
    verb.add_argument("--dpo", action="store_true", help="of preferences: every pair is two rows")
    verb.add_argument("--gpu", default=None, metavar="CARD", help="such as 3090: its memory and its rate")
    add_memory(verb)
    return verb


def run(options: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ConfigError: options of the other kind of plan, or what cannot be used.
    """
    if options.target.endswith(".toml"):
        if options.method or options.dpo or options.gpu:
            raise ConfigError("--method, --dpo and --gpu plan the tuning of a MODEL; CONFIG is a plan of pretraining")
        run_pretraining_plan(options)
        return
    if options.batch is not None:
        raise ConfigError("--batch is for pretraining, which is planned from a TOML file")
    from minicpm.cli.tuning_plan import run_tuning_plan

    run_tuning_plan(options)


def run_pretraining_plan(options: argparse.Namespace) -> None:
    """Print the plan of a configuration."""
    from minicpm.train.arithmetic import choose_arithmetic, choose_device
    from minicpm.train.plan import make_plan
    from minicpm.train.pretrain_config import PretrainConfig
    from minicpm.train.schedule import critical_batch_tokens, stage_bounds

    config = configuration.load(PretrainConfig, Path(options.target), options.overrides)
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
    suggest(f"minicpm pretrain {options.target}")
