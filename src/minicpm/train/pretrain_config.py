"""The whole configuration of a pretraining run: what `configs/*.toml` and `section.field=value` say.

What this leaves out: the fields' meaning, which stands with whoever reads them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from minicpm.architecture import ModelConfig
from minicpm.data.mixture import Mix, Span, StageMixture, stage_mixture
from minicpm.data.opening import sources_of
from minicpm.errors import ConfigError
from minicpm.train.optim import OptimizerConfig
from minicpm.train.schedule import ScheduleConfig, stage_bounds
from minicpm.train.settings import BatchConfig, CheckpointConfig, LoopConfig, require_folder_name


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from.

    Attributes:
        path: a folder, `tokenizer.json` or `tokenizer.model`; empty learns one of `model.vocab_size` ids from the run's
            own text.
        train_characters: how much text a new one learns from.
    """

    path: str = ""
    train_characters: int = 20_000_000

    def __post_init__(self) -> None:
        if self.train_characters < 1:
            raise ConfigError(f"train_characters must be at least 1, got {self.train_characters}")


@dataclass(frozen=True)
class CorpusConfig:
    """How the text of the mixtures is prepared.

    Attributes:
        cache: the folder for token shards; empty is `data` in the run's folder.
        heldout_share: documents set aside, by the hash of their text, for measuring.
        workers: processes that tokenize, and threads that make batches ahead; neither changes a batch.
        max_tokens: stop reading a source there; 0 reads all.
    """

    cache: str = ""
    heldout_share: float = 0.01
    workers: int = 1
    max_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_share < 1:
            raise ConfigError(f"heldout_share must be at least 0 and below 1, got {self.heldout_share}")
        if self.workers < 0 or self.max_tokens < 0:
            raise ConfigError("workers and max_tokens must not be negative")


@dataclass(frozen=True)
class PretrainConfig:
    """A run.

    Attributes:
        name: of the run's folder, `runs/NAME`.
        model: the network.
        schedule: the learning rate.
        stage: the mixtures, `[[stage]]` with `[[stage.mix]]`.
        data: one source that takes the place of all mixtures, for a quick run on one's own text.
        batch: sizes.
        optimizer: Adam and clipping.
        tokenizer: which.
        corpus: preparing text.
        loop: seed, dtype, and how often what is done.
        checkpoint: the history.
    """

    name: str
    model: ModelConfig
    schedule: ScheduleConfig
    stage: tuple[StageMixture, ...] = ()
    data: str = ""
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        require_folder_name(self.name)
        if not self.data and not self.stage:
            raise ConfigError("the run names no data; give data = PATH or at least one [[stage]] with a [[stage.mix]]")
        if self.batch.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"batch.sequence_length {self.batch.sequence_length} exceeds model.max_position_embeddings "
                f"{self.model.max_position_embeddings}"
            )
        # A wrong stage or source is said now, not after the text has been read.
        self.spans()
        sources_of(self.stages)

    @property
    def stages(self) -> tuple[StageMixture, ...]:
        """The mixtures in force."""
        return (StageMixture(mix=(Mix("data", 1.0, self.data),)),) if self.data else self.stage

    def spans(self) -> list[Span]:
        """Return the mixture of every stretch of rows; a stage that only continues the one before opens none."""
        spans: list[Span] = []
        for name, first_step, _ in stage_bounds(self.schedule):
            mixture = stage_mixture(self.stages, name)
            if not spans or mixture != spans[-1].mixture:
                spans.append(Span(self.batch.sequences_before(first_step), mixture))
        return spans

    def branch(self, step: int, steps: int, kind: str = "") -> PretrainConfig:
        """Return the configuration of a decay of `steps` that begins at `step`.

        It is that of a run that had been meant to decay there all along, so the two are the same to the bit.
        """
        schedule = self.schedule
        chosen = kind or (schedule.kind if schedule.kind.startswith("wsd") else "wsd-exp")
        if chosen not in ("wsd-exp", "wsd-linear", "wsd-sqrt"):
            raise ConfigError(f"a decay is wsd-exp, wsd-linear or wsd-sqrt, not {chosen!r}")
        decayed = dataclasses.replace(
            schedule,
            kind=chosen,  # type: ignore[arg-type]  # one of the three above
            total_steps=step + steps,
            # In steps: a share of another total would move the warm-up.
            warmup=float(schedule.warmup_steps),
            decay=float(steps),
            tail=0.0,
            half_life=0.0,
        )
        return dataclasses.replace(self, schedule=decayed)
