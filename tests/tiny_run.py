"""A pretraining run of two tiny layers on real text, started, cut short, gone on with; also as a process to kill.

python tests/tiny_run.py HOME RUN [FIELD=VALUE …]     trains to the end, going on where RUN has checkpoints
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from minicpm import config as configuration
from minicpm.train import arithmetic, checkpoint, flops, running
from minicpm.train.loop import Hook
from minicpm.train.pretrain import PretrainReady, prepare, pretrain
from minicpm.train.pretrain_config import PretrainConfig
from minicpm.train.run_start import Start, find_start

# Every scale differs from 1, the batch is a ramp of micro-batches, and every stage of the schedule has steps.
CONFIG = """
name = "tiny"
data = "{text}"
[model]
hidden_size = 48
intermediate_size = 80
num_hidden_layers = 2
num_attention_heads = 6
num_key_value_heads = 2
head_dim = 8
vocab_size = 400
scale_emb = 12.0
scale_depth = 1.4
dim_model_base = 24.0
[schedule]
total_steps = 20
warmup = 3
decay = 5
[batch]
sequence_length = 32
sequences = [2, 4]
ramp_steps = 4
micro_sequences = 2
[corpus]
cache = "{home}/data"
heldout_share = 0.1
[tokenizer]
path = "{tokenizer}"
[loop]
save_every = 5
saves_early = false
eval_every = 8
eval_sequences = 4
compile = "off"
"""
LAST = "step_000020"


def write_text(path: Path) -> Path:
    """Write paragraphs of a module of the standard library as JSON lines and return `path`."""
    paragraphs = Path(argparse.__file__).read_text(encoding="utf-8").split("\n\n")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs if text.strip()))
    return path


def make_home(home: Path) -> Path:
    """Fill a folder with text, a tokenizer and token shards that all runs share, and `tiny.toml`."""
    text = write_text(home / "text.jsonl")
    template = home / "tiny.toml"
    template.write_text(CONFIG.format(text=text, home=home, tokenizer=""))
    first = home / "first"
    prepare(load(home), first, Start(), print)
    template.write_text(CONFIG.format(text=text, home=home, tokenizer=first / "tokenizer"))
    return home


def load(home: Path, *overrides: str) -> PretrainConfig:
    return configuration.load(PretrainConfig, home / "tiny.toml", overrides)


def start(config: PretrainConfig, run: Path, wants_resume: bool = False) -> PretrainReady:
    return prepare(config, run, find_start(run, config, wants_resume, lambda line: None), lambda line: None)


_peak_once = functools.cache(flops.measure_peak)


@contextlib.contextmanager
def quick_runs() -> Iterator[None]:
    """Let runs that last a second measure the machine once and draw no picture; `unit/train` tests both."""
    before = torch.get_num_threads()
    # Tiny products gain nothing from a second thread, and lose much where other processes hold the cores.
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arithmetic, "measure_peak", _peak_once)
            patch.setattr(running, "plot_loss", lambda run, schedule: None)
            yield
    finally:
        torch.set_num_threads(before)


class Crash(Exception):
    """As sudden as a process that ends: nothing is saved or said on the way out."""


def go(
    config: PretrainConfig, run: Path, wants_resume: bool = False, crash_after: int = 0, hooks: Sequence[Hook] = ()
) -> None:
    """Train to the end, or until a hook crashes after a step."""

    def crash(state: object, record: object) -> None:
        if getattr(record, "step", 0) == crash_after:
            raise Crash

    try:
        pretrain(start(config, run, wants_resume), lambda line: None, [*hooks, crash])
    except Crash:
        assert crash_after


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file of a checkpoint that is whole."""
    return {name: facts["sha256"] for name, facts in checkpoint.verify(folder).files.items()}


if __name__ == "__main__":
    _home, _run, *_overrides = sys.argv[1:]
    with quick_runs():
        go(load(Path(_home), *_overrides), Path(_run), wants_resume=Path(_run).exists())
