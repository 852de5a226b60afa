"""Which row of which source stands at each place of a run: mixtures, stages and epochs as pure functions.

A run is one endless sequence of rows. Row g belongs to the stage whose span it lies in; within a stage a repeating
table deals rows out to sources, as evenly as whole rows allow, so that the shares of TOKENS hold over any stretch; and
a source's n-th row is row n mod R of its epoch n div R, in that epoch's own order. A later stage goes on in each source
where the earlier one stopped. Nothing is drawn and nothing is remembered: reaching row 10⁹ costs what row 0 does.

What this leaves out: steps and batch sizes, which belong to the trainer; it asks for rows by their number.

Source: MiniCPM technical report (arXiv 2404.06395) §6.2 and Fig. 11 for mixtures per stage; that a weight is a share of
tokens, so that P(row) ∝ weight / tokens per row, follows the sampler of the original training code.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from minicpm.data.packing import RowPlan
from minicpm.data.permutation import key_of, permute
from minicpm.errors import ConfigError, DataError

MixKind: TypeAlias = Literal["text", "rows"]

# Rows of the repeating table: shares are met to 1/65,536, and its arrays stay below a megabyte.
_CYCLE_ROWS = 1 << 16


@dataclass(frozen=True)
class Mix:
    r"""One source of a stage.

    Attributes:
        name: unique; the name under which its loss is logged.
        weight: its share of the stage's tokens.
        path: text or token shards: a file, folder, glob, `stdlib:` or `hf:…`; empty where another stage of the run
            gives it under the same name.
        field: the field of a row that holds the text, or a template such as "{en}\n{zh}".
        kind: `text`, or `rows` for conversations and instructions, of which only the answers are targets.
        max_epochs: how often its rows may be seen at most; 0 is without limit.
    """

    name: str
    weight: float
    path: str = ""
    field: str = "text"
    kind: MixKind = "text"
    max_epochs: float = 0.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name of a mix must not be empty")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"weight of {self.name} must be a positive share of tokens, got {self.weight}")
        if not self.max_epochs >= 0:
            raise ConfigError(f"max_epochs of {self.name} must not be negative, got {self.max_epochs}")


@dataclass(frozen=True)
class StageMixture:
    """The sources of one stage (`[[stage]]` with its `[[stage.mix]]` in TOML).

    Attributes:
        mix: the sources; weights sum to 1.
        name: `stable`, `decay`, …; see `stage_mixture`.
        normalise: whether weights are divided by their sum instead of being refused.
    """

    mix: tuple[Mix, ...]
    name: str = "stable"
    normalise: bool = False

    def __post_init__(self) -> None:
        if not self.mix:
            raise ConfigError(f"stage {self.name} has no mix; give at least one [[stage.mix]] with name, path, weight")
        names = [mix.name for mix in self.mix]
        twin = next((name for name in names if names.count(name) > 1), None)
        if twin is not None:
            raise ConfigError(f"stage {self.name} names the mix {twin!r} twice; names must be unique")
        total = sum(mix.weight for mix in self.mix)
        if not self.normalise and abs(total - 1) > 1e-6:
            raise ConfigError(
                f"weights of stage {self.name} sum to {total:.6g}, not 1 ({', '.join(names)}); correct them or set "
                "normalise = true"
            )

    @property
    def shares(self) -> dict[str, float]:
        """Share of tokens by name; sums to 1."""
        total = sum(mix.weight for mix in self.mix)
        return {mix.name: mix.weight / total for mix in self.mix}


def stage_mixture(stages: Sequence[StageMixture], name: str) -> StageMixture:
    """Return the mixture of stage `name`: its own, else that of the nearest earlier stage of a run, else the first.

    Raises:
        ConfigError: there are none, or two have one name.
    """
    if not stages:
        raise ConfigError("the run names no data; give at least one [[stage]] with a [[stage.mix]]")
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"two stages have the name {max(names, key=names.count)!r}; names must be unique")
    order = ("warmup", "stable", "decay", "tail")
    wrong = next((i for i, n in enumerate(names) if n not in order), None)
    if wrong is not None:
        near = difflib.get_close_matches(names[wrong], order, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(order)}"
        raise ConfigError(f"stage[{wrong}].name: unknown stage {names[wrong]!r}; {hint}")
    by_name = {stage.name: stage for stage in stages}
    for candidate in reversed(order[: order.index(name) + 1]):
        if candidate in by_name:
            return by_name[candidate]
    return stages[0]


class Span(NamedTuple):
    """From which row of the run on a mixture holds."""

    first_row: int
    mixture: StageMixture


class Place(NamedTuple):
    """Row `row` of the plan of source `source`, in its epoch `epoch`."""

    source: int
    row: int
    epoch: int


class _Table:
    """One stage's cycle: which source each row goes to."""

    def __init__(self, span: Span, names: Sequence[str], plans: Mapping[str, RowPlan]) -> None:
        self.first_row = span.first_row
        # Rows, not tokens, are dealt out: a source whose rows are half empty gets twice as many.
        rate = np.array([s / plans[n].tokens_per_row for n, s in span.mixture.shares.items()])
        counts = _apportion(rate / rate.sum(), _CYCLE_ROWS)
        sources = np.repeat([names.index(n) for n in span.mixture.shares], counts)
        # The j-th of c rows is due at (j + ½)/c of the cycle: in order of due dates every source is evenly spread.
        due = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
        self.source = sources[np.argsort(due, kind="stable")].astype(np.int16)
        is_source = self.source == np.arange(len(names), dtype=np.int16)[:, None]
        before = np.cumsum(is_source, axis=1, dtype=np.int32)
        self.counts = before[:, -1].astype(np.int64)
        self.number = before[self.source, np.arange(_CYCLE_ROWS)] - 1
        self._before = before

    def dealt(self, num_rows: int) -> NDArray[np.int64]:
        """Return how many of the stage's first `num_rows` rows went to each source; (sources)."""
        cycles, rest = divmod(num_rows, _CYCLE_ROWS)
        partial = self._before[:, rest - 1] if rest else np.zeros_like(self.counts)
        return self.counts * cycles + partial


def _apportion(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    # Largest remainders, and nobody that has a share goes empty.
    ideal = shares * total
    counts = np.maximum(np.floor(ideal).astype(np.int64), 1)
    for index in np.argsort(-(ideal - counts), kind="stable")[: max(total - int(counts.sum()), 0)]:
        counts[index] += 1
    while counts.sum() > total:
        counts[np.argmax(counts - ideal)] -= 1
    return counts


class RowOrder:
    """The sequence of rows of a run."""

    def __init__(self, spans: Sequence[Span], plans: Mapping[str, RowPlan], seed: int) -> None:
        """Build the tables.

        Args:
            spans: in order of their first rows; the first begins at 0.
            plans: the rows of every source that a span names.
            seed: of the order within epochs.

        Raises:
            ConfigError: the spans are out of order, or one names a source that has no plan.
        """
        firsts = [span.first_row for span in spans]
        if not spans or firsts[0] != 0 or firsts != sorted(firsts):
            raise ConfigError(f"stages must begin at rows 0, …, in order; got {firsts}")
        self.names = tuple(dict.fromkeys(name for span in spans for name in span.mixture.shares))
        unknown = [name for name in self.names if name not in plans]
        if unknown:
            raise ConfigError(f"mixture name {unknown[0]!r} is unknown; there are {', '.join(plans) or 'none'}")
        self._limits = {m.name: m.max_epochs for span in spans for m in span.mixture.mix if m.max_epochs}
        self.plans = [plans[name] for name in self.names]
        self._keys = [[seed, name] for name in self.names]
        self._tables = [_Table(span, self.names, plans) for span in spans]
        self._dealt_before = [np.zeros(len(self.names), dtype=np.int64)]
        for table, following in zip(self._tables, self._tables[1:], strict=False):
            self._dealt_before.append(self._dealt_before[-1] + table.dealt(following.first_row - table.first_row))

    def places(self, first_row: int, num_rows: int) -> list[Place]:
        """Return where rows first_row … first_row + num_rows - 1 of the run come from."""
        return [self._place(row) for row in range(first_row, first_row + num_rows)]

    def epochs(self, num_rows: int) -> dict[str, float]:
        """Return how often each source's rows have been seen after the first `num_rows` rows of the run."""
        index = self._stage_index(max(num_rows - 1, 0))
        table = self._tables[index]
        dealt = self._dealt_before[index] + table.dealt(num_rows - table.first_row)
        return {n: int(d) / p.num_rows for n, d, p in zip(self.names, dealt, self.plans, strict=True)}

    def check_epochs(self, num_rows: int) -> None:
        """Do nothing if the first `num_rows` rows keep within every `max_epochs`.

        Raises:
            DataError: a source does not have enough rows.
        """
        for name, epochs in self.epochs(num_rows).items():
            limit = self._limits.get(name, 0.0)
            if limit and epochs > limit:
                raise DataError(
                    f"the run would see {name} {epochs:.2f} times, its max_epochs is {limit:g}; lower its weight or "
                    "the number of steps, or add text"
                )

    def _stage_index(self, row: int) -> int:
        return max(i for i, table in enumerate(self._tables) if table.first_row <= row)

    def _place(self, row: int) -> Place:
        index = self._stage_index(row)
        table = self._tables[index]
        cycle, rest = divmod(row - table.first_row, _CYCLE_ROWS)
        source = int(table.source[rest])
        number = int(self._dealt_before[index][source] + table.counts[source] * cycle + table.number[rest])
        size = self.plans[source].num_rows
        epoch, within = divmod(number, size)
        key = key_of(*self._keys[source], epoch)
        return Place(source, int(permute(np.array([within], dtype=np.int64), size, key)[0]), epoch)
