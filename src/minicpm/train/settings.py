"""What a training run is made of, apart from data: every field declared once, for TOML, command line and manifest.

What this leaves out: the data section, which belongs to whoever makes the batches (`pretrain.PretrainConfig` joins it).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from minicpm.errors import ConfigError
from minicpm.train.schedule import ScheduleConfig, batch_sequences


@dataclass(frozen=True)
class BatchConfig:
    """How many tokens one update sees.

    Attributes:
        sequence_length: tokens of a row.
        sequences: rows of a global batch; several numbers are a ramp, each for `ramp_steps` steps, the last for good.
        ramp_steps: steps of each size but the last.
        micro_sequences: rows of one forward pass; 0 takes as many as the plan finds room for.
    """

    sequence_length: int = 512
    sequences: tuple[int, ...] = (16,)
    ramp_steps: int = 0
    micro_sequences: int = 0

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length must be at least 2, got {self.sequence_length}")
        if not self.sequences or min(self.sequences) < 1:
            raise ConfigError(f"sequences must be one or more numbers of at least 1, got {list(self.sequences)}")
        if self.micro_sequences < 0 or self.ramp_steps < 0:
            raise ConfigError("micro_sequences and ramp_steps must not be negative")
        if len(self.sequences) > 1 and not self.ramp_steps:
            raise ConfigError(f"sequences is a ramp of {len(self.sequences)} sizes and needs ramp_steps")

    def at(self, step: int) -> int:
        """Return the rows of the global batch of update `step`."""
        return batch_sequences(self.sequences, self.ramp_steps, step)

    def sequences_before(self, step: int) -> int:
        """Return the rows of all updates before `step`: where its batch begins in the order of the data."""
        steps, before = step - 1, 0
        for size in self.sequences[:-1]:
            of_size = min(steps, self.ramp_steps)
            steps -= of_size
            before += of_size * size
        return before + steps * self.sequences[-1]

    def tokens_through(self, step: int) -> int:
        """Return the tokens that a run has seen after update `step`."""
        return self.sequences_before(step + 1) * self.sequence_length

    def split(self, step: int, rank: int, world: int, micro_sequences: int) -> list[tuple[int, int]]:
        """Return [(first row, rows)] of the micro-batches that `rank` of `world` computes of update `step`'s batch.

        Raises:
            ConfigError: the batch cannot be dealt out evenly.
        """
        total = self.at(step)
        if total % world:
            raise ConfigError(f"a batch of {total} rows cannot be dealt out to {world} processes evenly")
        share = total // world
        first = rank * share
        micro = min(micro_sequences, share)
        return [(first + i, min(micro, share - i)) for i in range(0, share, micro)]


@dataclass(frozen=True)
class LoopConfig:
    """How the loop runs, what it writes, and how often.

    Attributes:
        seed: of the first weights and of the data's order.
        dtype: what is computed in; float16, for GPUs without bfloat16, has its loss scaled.
        device: `auto` takes a GPU where there is one.
        compile: `auto` compiles runs of 200 steps and more where a C++ compiler is.
        products: what bf16 values are multiplied in by compiled layers on a CPU; `auto` takes what is faster there.
        recompute_every: 1 recomputes every layer in the backward pass, 2 every second, 0 none.
        log_every: steps between records in `metrics.jsonl`.
        save_every: steps between checkpoints.
        saves_early: whether steps 1, 2, 4, 8 … below `save_every` are saved too.
        eval_every: steps between measurements on held-out text; 0 is never.
        eval_sequences: rows of held-out text at each.
        sample_every: steps between samples; 0 is never.
        sample_prompts: what samples begin with.
        sample_tokens: how long they are.
        uses_tensorboard: whether events are written for TensorBoard too.
    """

    seed: int = 1234
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: str = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    products: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    recompute_every: int = 0
    log_every: int = 1
    save_every: int = 500
    saves_early: bool = True
    eval_every: int = 250
    eval_sequences: int = 32
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ("The ",)
    sample_tokens: int = 40
    uses_tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "eval_sequences", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("recompute_every", "eval_every", "sample_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")

    def is_saved(self, step: int, total_steps: int) -> bool:
        """Return whether the checkpoint of `step` is due: a multiple, an early power of two, or the last."""
        if step % self.save_every == 0 or step == total_steps:
            return True
        return self.saves_early and step < self.save_every and step & (step - 1) == 0


@dataclass(frozen=True)
class CheckpointConfig:
    """The history: every checkpoint's weights, coded small.

    Attributes:
        history: its folder; empty is `history` in the run's folder, `off` keeps none.
        every: steps between its checkpoints, besides those that are saved whole; 0 is these alone.
        base_error: of the base layer, as a share of each row's standard deviation.
        max_reads: byte ranges that a tensor needs at most, at any step.
    """

    history: str = ""
    every: int = 0
    base_error: float = 0.06
    max_reads: int = 16

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"every must not be negative, got {self.every}")
        if not 0.005 <= self.base_error <= 0.5 or self.max_reads < 2:
            raise ConfigError(
                f"base_error must lie between 0.005 and 0.5 and max_reads be at least 2, "
                f"got {self.base_error} and {self.max_reads}"
            )


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is; what depends on it takes it as an argument."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank must lie in 0…{self.world - 1}, got {self.rank}")

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and lines."""
        return self.rank == 0


def require_folder_name(name: str) -> None:
    """Raise ConfigError where a run's `name` could not be a folder's."""
    if not name or Path(name).name != name or name.startswith("."):
        raise ConfigError(f"name must be a plain folder name, got {name!r}")


class RunConfig(Protocol):
    """What the configuration of any run has."""

    @property
    def name(self) -> str:
        """Of the run's folder."""

    @property
    def schedule(self) -> ScheduleConfig:
        """The learning rate."""

    @property
    def batch(self) -> BatchConfig:
        """Sizes."""

    @property
    def loop(self) -> LoopConfig:
        """Seed, dtype, and how often what is done."""

    @property
    def checkpoint(self) -> CheckpointConfig:
        """The history."""
