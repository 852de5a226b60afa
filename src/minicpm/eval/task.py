"""A task: where its rows come from, and the forms in which they are put to a model. Read from TOML.

The package's own tasks are the files in `tasks/`; a path to another TOML file is a task too. What this leaves out: the
templates' meaning (`forms.py`) and the judgement of answers (`scorers.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minicpm.config import load
from minicpm.errors import ConfigError
from minicpm.eval.scorers import SCORERS

Mode = Literal["choice", "cloze", "perplexity", "generate", "dialogue"]
PROTOCOLS = ("plain", "ultraeval")
FOLDER = Path(__file__).with_name("tasks")

# The one figure that a form is known by, and the others that it gives.
METRICS: dict[str, tuple[str, ...]] = {
    "choice": ("acc", "acc_norm"),
    "cloze": ("acc", "perplexity"),
    "perplexity": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate": ("acc",),
    "dialogue": ("score", "score_turn_1", "score_turn_2"),
}


@dataclass(frozen=True)
class Hub:
    """Where the rows are published, for `datasets`.

    Attributes:
        path: the dataset's name.
        config: its configuration.
        split: which rows.
        shots_split: which rows are examples.
    """

    path: str
    config: str | None = None
    split: str = "test"
    shots_split: str | None = None


@dataclass(frozen=True)
class Join:
    """Another file, which every row sees as a mapping.

    Attributes:
        file: its name.
        key: the field by which its rows are found.
        name: the field that holds the mapping.
    """

    file: str
    key: str
    name: str


@dataclass(frozen=True)
class Form:
    """One way to put a row. Texts are Jinja templates over the row's fields, `gold` and lists are Jinja expressions.

    Attributes:
        name: distinguishes the forms of a task.
        mode: what is asked of the model, and how the answer is read.
        protocols: those that use this form.
        is_paraphrase: whether it only says the same in other words (`--paraphrases`).
        metric: the figure that the form is known by; empty: the first of its mode.
        description: stands before everything.
        context: what the model reads.
        contexts: an expression, in the place of `context`: one context per choice, before the same `continuation`.
        choices: an expression: the answers to choose from.
        continuation: what is scored after the context; in mode perplexity, the text.
        counted: in mode perplexity: the text whose words and bytes are counted.
        gold: an expression: the index of the right choice, or the right answer.
        delimiter: stands between a context and its continuation.
        separator: stands after each example.
        shots: how many examples precede the row.
        group: an expression: examples are taken from the rows of the same group.
        scorer: how a generated answer is judged.
        max_new_tokens: the longest answer.
        stop: texts that end it.
        is_chat: whether the model's chat template is used.
    """

    name: str
    mode: Mode
    protocols: tuple[str, ...] = ("plain",)
    is_paraphrase: bool = False
    metric: str = ""
    description: str = ""
    context: str = ""
    contexts: str = ""
    choices: str = ""
    continuation: str = ""
    counted: str = ""
    gold: str = "0"
    delimiter: str = " "
    separator: str = "\n\n"
    shots: int = 0
    group: str = "''"
    scorer: str = ""
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    is_chat: bool = False

    def __post_init__(self) -> None:
        if self.metric and self.metric not in METRICS[self.mode]:
            raise ConfigError(f"metric of mode {self.mode} must be one of {METRICS[self.mode]}, got {self.metric!r}")
        unknown = set(self.protocols) - set(PROTOCOLS)
        if unknown:
            raise ConfigError(f"unknown protocol {sorted(unknown)[0]!r}; there are {', '.join(PROTOCOLS)}")
        if self.mode == "generate" and self.scorer not in SCORERS:
            raise ConfigError(f"unknown scorer {self.scorer!r}; there are {', '.join(SCORERS)}")
        if self.shots < 0 or self.max_new_tokens < 1:
            raise ConfigError("shots must not be negative, and max_new_tokens must be at least 1")

    def with_shots(self, shots: int | None) -> Form:
        """Return the form with another number of examples, where it can have any."""
        if shots is None or self.mode in ("perplexity", "dialogue"):
            return self
        return dataclasses.replace(self, shots=shots)

    @property
    def known_by(self) -> str:
        """The metric that the form is known by."""
        return self.metric or METRICS[self.mode][0]


@dataclass(frozen=True)
class Task:
    """Rows and the forms in which they are put.

    Attributes:
        version: grows with every change that changes a score.
        source: who made the rows and the forms.
        file: the rows, in a folder of evaluation data.
        shots_file: rows for examples; without one they come from `file`, never the row itself.
        join: other files whose rows each row sees.
        examples: an expression: which rows of `file` are examples and are not scored; empty: any but the row itself.
        hub: where else the rows are had.
        where: an expression: which rows are used.
        split_at: of a text file: a regular expression that matches where a row begins.
        needs_code: whether answers are programs that are run.
        form: the forms.
    """

    version: int
    source: str
    file: str
    form: tuple[Form, ...]
    shots_file: str = ""
    join: tuple[Join, ...] = ()
    examples: str = ""
    hub: Hub | None = None
    where: str = "true"
    split_at: str = ""
    needs_code: bool = False

    def __post_init__(self) -> None:
        names = [form.name for form in self.form]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"a task needs forms, each with a name of its own; got {names}")

    def forms(self, protocol: str, *, with_paraphrases: bool = False) -> list[Form]:
        """Return the forms that `protocol` uses."""
        return [f for f in self.form if protocol in f.protocols and (with_paraphrases or not f.is_paraphrase)]


def task_names() -> list[str]:
    """Return the names of the package's own tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_task(name: str) -> Task:
    """Return the task called `name`, or the one in the TOML file at that path.

    Raises:
        ConfigError: there is none, or its file is wrong; names the field.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name, task_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(task_names())}"
        raise ConfigError(f"no task {name!r}; {hint}")
    return load(Task, path)
