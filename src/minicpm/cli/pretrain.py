"""`minicpm pretrain CONFIG`: text to a model by the MiniCPM recipe, every checkpoint kept, resumable to the bit."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm import config as configuration
from minicpm.cli.parser import Parser
from minicpm.cli.run_options import add_memory, memory_of, run_to_end
from minicpm.cli.terminal import note


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "pretrain",
        "Train a model from nothing: warm-up, stable stage, decay. Any field of the configuration can be given as "
        "section.field=value. Ctrl-C saves and stops.",
        examples=[
            "minicpm pretrain configs/nano.toml",
            "minicpm pretrain configs/nano.toml data=texts/ schedule.total_steps=2000",
            "minicpm pretrain configs/nano.toml --resume",
        ],
    )
    verb.add_argument("config", metavar="CONFIG", type=Path, help="a TOML file")
    verb.add_argument("overrides", metavar="FIELD=VALUE", nargs="*", help="such as schedule.lr=0.02")
    verb.add_argument("--out", type=Path, default=None, metavar="RUN", help="the run's folder (default: runs/NAME)")
    verb.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    add_memory(verb)
    return verb


def run(options: argparse.Namespace) -> None:
    """Check everything, show the plan, train."""
    from minicpm.train.allocator import tune

    tune(note)
    from minicpm.train.pretrain import prepare
    from minicpm.train.pretrain_config import PretrainConfig
    from minicpm.train.run_start import find_start

    config = configuration.load(PretrainConfig, options.config, options.overrides)
    folder = options.out or Path("runs") / config.name
    start = find_start(folder, config, options.resume, note)
    run_to_end(prepare(config, folder, start, note, memory_of(options)))
