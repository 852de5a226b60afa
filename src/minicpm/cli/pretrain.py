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
        "section.field=value. Ctrl-C saves and stops. --from goes on from a model instead: network and tokenizer are "
        "then the model's, moments begin at zero, and the warm-up lets the rate rise from 0 again.",
        examples=[
            "minicpm pretrain configs/nano.toml",
            "minicpm pretrain configs/nano.toml data=texts/ schedule.total_steps=2000",
            "minicpm pretrain configs/nano.toml --resume",
            "minicpm pretrain configs/nano.toml --from smollm2 data=texts/ schedule.lr=1e-4 optimizer.is_mup=false",
        ],
    )
    verb.add_argument("config", metavar="CONFIG", type=Path, help="a TOML file")
    verb.add_argument("overrides", metavar="FIELD=VALUE", nargs="*", help="such as schedule.lr=0.02")
    verb.add_argument("--out", type=Path, default=None, metavar="RUN", help="the run's folder (default: runs/NAME)")
    verb.add_argument(
        "--from", dest="base", default=None, metavar="MODEL", help="a name, a folder, a GGUF file, or RUN@STEP"
    )
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
    base = None
    if options.base is not None:
        from minicpm.formats.checkpoint import open_checkpoint
        from minicpm.history.naming import resolve
        from minicpm.train.continuation import continue_from

        base = open_checkpoint(resolve(options.base))
        config = continue_from(config, base, folder)
        note(
            f"from {options.base}: its network and tokenizer take the place of [model] and [tokenizer]; the rate rises "
            f"from 0 over {config.schedule.warmup_steps} steps"
        )
    start = find_start(folder, config, options.resume, note)
    run_to_end(prepare(config, folder, start, note, memory_of(options), base=base))
