"""The whole configuration of a tuning run: what `section.field=value` on the command line says.

What this leaves out: the fields that pretraining has too, whose meaning stands with whoever reads them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from minicpm.errors import ConfigError
from minicpm.model.lora import LoRASettings
from minicpm.tokenizer.chat import TrainedTurns
from minicpm.train.optimizer_config import OptimizerConfig
from minicpm.train.schedule import ScheduleConfig
from minicpm.train.settings import BatchConfig, CheckpointConfig, LoopConfig, require_folder_name

Goal = Literal["sft", "dpo"]
Method = Literal["full", "lora", "qlora"]


@dataclass(frozen=True)
class RowsConfig:
    """What is learned from.

    Attributes:
        sources: files, folders, globs or data sets of rows.
        heldout: rows to measure on; empty sets a share of the others aside.
        heldout_share: that share, by the hash of a row's text.
        turns: whether the last answer of a conversation or all of them are targets.
        drops_bad: whether rows that cannot be used are dropped and counted.
        identity: "name=…,author=…": rows that teach the model its own name are mixed in.
        identity_copies: how often each of them stands among the rows.
    """

    sources: tuple[str, ...] = ()
    heldout: str = ""
    heldout_share: float = 0.05
    turns: TrainedTurns = "last"
    drops_bad: bool = False
    identity: str = ""
    identity_copies: int = 4

    def __post_init__(self) -> None:
        if not self.sources and not self.identity:
            raise ConfigError("no rows are given; name at least one file of them")
        if not 0 <= self.heldout_share < 1:
            raise ConfigError(f"heldout_share must be at least 0 and below 1, got {self.heldout_share}")
        if self.identity_copies < 1:
            raise ConfigError(f"identity_copies must be at least 1, got {self.identity_copies}")


@dataclass(frozen=True)
class PreferenceConfig:
    """The loss on preferred and judged answers; see `preference`.

    Attributes:
        loss: sigmoid (DPO) and ipo take pairs, kto takes judged answers.
        beta: how much a log ratio counts: small lets the model go far from its reference.
        label_smoothing: the share of pairs believed to be the wrong way round, of sigmoid.
        good_weight: of good answers, of kto.
        bad_weight: of bad ones.
    """

    loss: Literal["sigmoid", "ipo", "kto"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    good_weight: float = 1.0
    bad_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0 or not 0 <= self.label_smoothing < 0.5 or min(self.good_weight, self.bad_weight) < 0:
            raise ConfigError(
                "beta must be positive, label_smoothing lie in [0, 0.5) and the weights not be negative; got "
                f"{self.beta}, {self.label_smoothing}, {self.good_weight}, {self.bad_weight}"
            )
        if self.label_smoothing and self.loss != "sigmoid":
            raise ConfigError(f"label_smoothing is for the loss sigmoid, not {self.loss}")


@dataclass(frozen=True)
class TuneConfig:
    """A run.

    Attributes:
        name: of the run's folder.
        base: the model that is tuned: a name, a path, or RUN@STEP.
        goal: supervised tuning or preferences.
        method: all weights, adapters, or adapters on a base in 4-bit blocks.
        block_type: of the blocks that qlora rounds a float base to; a base in blocks keeps its own.
        epochs: passes over the rows; 0 takes schedule.total_steps.
        schedule: the learning rate.
        rows: what is learned from.
        batch: sizes.
        optimizer: Adam, clipping, and what is kept of each parameter.
        loop: seed, dtype, and how often what is done.
        checkpoint: the history, of full tuning.
        lora: adapters, of lora and qlora.
        preference: the loss of dpo.
    """

    name: str
    base: str
    rows: RowsConfig
    goal: Goal = "sft"
    method: Method = "lora"
    block_type: Literal["Q4_0", "Q4_1", "Q8_0"] = "Q4_1"
    epochs: float = 1.0
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(total_steps=1))
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    lora: LoRASettings = field(default_factory=LoRASettings)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)

    def __post_init__(self) -> None:
        require_folder_name(self.name)
        if not self.base:
            raise ConfigError("base must name a model, such as smollm2 or runs/nano@2000")
        if self.epochs < 0:
            raise ConfigError(f"epochs must not be negative, got {self.epochs}")
        if self.goal == "dpo" and self.rows.identity:
            raise ConfigError("rows.identity is for supervised tuning; preferences have no such rows")
        if self.method != "full" and self.optimizer.masters == "none":
            raise ConfigError(f"optimizer.masters none is for full tuning; the adapters of {self.method} are float32")
        if self.method != "full" and self.loop.compile == "on":
            raise ConfigError(f"loop.compile on is for full tuning; {self.method} runs uncompiled")
        if self.optimizer.is_fused and self.batch.micro_sequences not in (0, max(self.batch.sequences)):
            raise ConfigError(
                "optimizer.is_fused needs one micro-batch a step: set batch.micro_sequences to batch.sequences, "
                f"{max(self.batch.sequences)}"
            )

    def with_steps(self, num_rows: int) -> TuneConfig:
        """Return the configuration with the steps that `epochs` of so many rows take."""
        if not self.epochs:
            return self
        steps = max(1, -(-round(self.epochs * num_rows) // self.batch.sequences[-1]))
        return dataclasses.replace(self, schedule=dataclasses.replace(self.schedule, total_steps=steps))
