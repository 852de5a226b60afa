"""What `minicpm plan MODEL` says: whether tuning fits, in which way, and what would make it fit."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minicpm import config as configuration
from minicpm.architecture import PRESETS
from minicpm.cli.run_options import component_table, memory_of
from minicpm.cli.terminal import note, out, suggest, table
from minicpm.cli.tuning import METHODS, defaults
from minicpm.errors import ConfigError

if TYPE_CHECKING:
    from minicpm.train.cards import Card
    from minicpm.train.tune_config import TuneConfig
    from minicpm.train.tune_plan import Base

# The share of a card's stated rate that training reaches in practice; not measured here.
_CARD_SHARE = 0.4


@dataclass(frozen=True)
class Place:
    """Where a run would be: a card, or this machine."""

    card: Card | None
    memory_bytes: int
    peak_flops: float

    def __str__(self) -> str:
        return f"a {self.card.name} of {self.card.gib} GiB" if self.card else "this machine"


def run_tuning_plan(options: argparse.Namespace) -> None:
    """Print the plan of one method, or one line of each.

    Raises:
        ConfigError: the model or a setting cannot be used.
        SystemExit: 1 where the one method that is asked for does not fit.
    """
    base = base_of(options.target)
    goal = "dpo" if options.dpo else "sft"
    methods = [options.method] if options.method else list(METHODS)
    configs = {method: plan_config(options, method, goal) for method in methods}
    place = place_of(options, next(iter(configs.values())))
    counts = base.model.num_parameters()
    out(f"{options.target}: {counts.total:,} parameters; on {place}, which gives {_size(place.memory_bytes)}")
    if options.method:
        show_method(base, configs[options.method], place, f"minicpm {goal} {options.target} ROWS")
        return
    rows = [[method, *summary(base, config, place)] for method, config in configs.items()]
    out(table(["method", "bytes", "rows at once", "with"], rows, right=[1, 2]))
    suggest(f"minicpm plan {options.target} --method lora")


def base_of(target: str) -> Base:
    """Return the shape of a model: a preset's, a config.json's, or that of a file or folder, weights unread.

    Raises:
        MiniCPMError: there is no such model.
    """
    from minicpm.formats.checkpoint import open_checkpoint
    from minicpm.formats.hf_config import config_from_hf
    from minicpm.formats.json_file import read_json
    from minicpm.history.naming import resolve
    from minicpm.train.tune_plan import Base

    if target in PRESETS:
        return Base(PRESETS[target])
    path = resolve(target)
    if path.suffix == ".json":
        return Base(config_from_hf(read_json(path), str(path)))
    return Base.of(open_checkpoint(path))


def plan_config(options: argparse.Namespace, method: str, goal: str) -> TuneConfig:
    """Return the configuration of one step of a run.

    Raises:
        ConfigError: a setting that cannot be used.
    """
    from minicpm.train.cards import card
    from minicpm.train.tune_config import TuneConfig

    words = ["name=plan", "base=model", 'rows.sources=["ROWS"]', "epochs=0.0", f"method={method}", f"goal={goal}"]
    if options.gpu and not card(options.gpu).has_bfloat16:
        words.append("loop.dtype=float16")
    return configuration.load(TuneConfig, None, [*defaults(method, goal), *words, *options.overrides])


def place_of(options: argparse.Namespace, config: TuneConfig) -> Place:
    """Return where the run would be, with the rate of its products.

    Raises:
        ConfigError: no such card, a size that is none, or a card that has not the dtype.
    """
    from minicpm.train.cards import card
    from minicpm.train.flops import measure_peak
    from minicpm.train.plan import available_bytes
    from minicpm.train.state import DTYPES

    memory = memory_of(options)
    if not options.gpu:
        from minicpm.train.arithmetic import choose_device

        device = choose_device(config.loop.device)
        return Place(None, memory or available_bytes(), measure_peak(DTYPES[config.loop.dtype], device))
    found = card(options.gpu)
    if config.loop.dtype == "bfloat16" and not found.has_bfloat16:
        raise ConfigError(f"a {found.name} has no bfloat16; set loop.dtype=float16, which scales the loss")
    return Place(found, memory or found.usable_bytes, _CARD_SHARE * found.tera_flops * 1e12)


def summary(base: Base, config: TuneConfig, place: Place) -> list[str]:
    """Return bytes, rows at once and settings of a method: as it is, else the first settings that make it fit."""
    from minicpm.train.tune_plan import first_fitting, make_tune_plan

    fitting = first_fitting(base, config, place.memory_bytes)
    if fitting is None:
        return [_size(make_tune_plan(base, config).total_bytes), "0", "does not fit"]
    plan = make_tune_plan(base, fitting[1], memory_bytes=place.memory_bytes)
    return [_size(plan.total_bytes), str(plan.micro_sequences), fitting[0] or "its defaults"]


def show_method(base: Base, config: TuneConfig, place: Place, command: str) -> None:
    """Print a method's bytes by component, whether they fit, and the time.

    Raises:
        SystemExit: 1 where they do not fit.
    """
    from minicpm.train.tune_plan import first_fitting, make_tune_plan, most_at_once

    single = most_at_once(base, config, place.memory_bytes)
    memory = place.memory_bytes if single[0] else 0
    plan = make_tune_plan(base, config, memory_bytes=memory, peak_flops=place.peak_flops)
    out(component_table(plan))
    length, batch = config.batch.sequence_length, max(config.batch.sequences)
    if not single[0] or plan.total_bytes > place.memory_bytes:
        out(f"does not fit into {_size(place.memory_bytes)}")
        fitting = first_fitting(base, config, place.memory_bytes)
        out(
            f"with {fitting[0]} it fits"
            if fitting
            else "no setting makes it fit; see the other methods without --method"
        )
        raise SystemExit(1)
    out(
        f"fits: {plan.micro_sequences} of the batch's {batch} rows of {length} tokens at once; at most {single[0]:,} "
        f"of them, or one of {single[1]:,} tokens"
    )
    show_time(plan.tokens_per_second, batch * length, place)
    out(f"each checkpoint takes {_size(plan.checkpoint_bytes)}")
    if config.loop.dtype == "float16":
        note("float16: the loss is scaled")
    suggest(command + f" --method {config.method}")


def show_time(tokens_per_second: float, batch_tokens: int, place: Place) -> None:
    """Print what a step and a million tokens take."""
    from minicpm.train.log import duration

    step, million = (duration(tokens / tokens_per_second) for tokens in (batch_tokens, 1_000_000))
    how = "as a product measured just now gives" if place.card is None else (
        f"at {_CARD_SHARE:.0%} of the {place.card.tera_flops:g} TFLOP/s that its maker states; not measured"
    )  # fmt: skip
    out(f"a step takes about {step}, a million tokens {million}, {how}")


def _size(count: int) -> str:
    from minicpm.train.plan import size

    return size(count)
