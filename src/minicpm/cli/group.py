"""A verb with verbs of its own: `minicpm data clean`, each with its own options and help."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence

from minicpm.cli.parser import Parser, UsageError
from minicpm.cli.terminal import out

Run = Callable[[argparse.Namespace], None]


class Group(Parser):
    """The parser of a verb whose first word chooses among its own verbs."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(name, description)
        self._verbs: dict[str, tuple[Parser, Run]] = {}

    def add(self, name: str, parser: Parser, run: Run) -> None:
        """Add the verb `name`, whose parser is named "group verb"."""
        self._verbs[name] = (parser, run)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the options of the chosen verb, with `run` to call on them.

        Raises:
            UsageError: no such verb, or its options are wrong.
        """
        if not arguments or arguments[0] in {"-h", "--help", "help"}:
            out(self._overview())
            raise SystemExit(0)
        name, *rest = arguments
        if name not in self._verbs:
            near = difflib.get_close_matches(name, self._verbs, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self._verbs)}"
            raise UsageError(f"{self.prog} has no verb {name!r}; {hint}")
        parser, run = self._verbs[name]
        options = parser.parse(rest)
        options.run = run
        return options

    def _overview(self) -> str:
        width = max(map(len, self._verbs))
        lines = [f"  {name:{width}}  {_first_sentence(p)}" for name, (p, _) in self._verbs.items()]
        rest = f"more about each: {self.prog} VERB --help"
        return "\n".join([f"usage: {self.prog} VERB [ARGUMENTS]", "", self.description or "", "", *lines, "", rest])


def _first_sentence(parser: Parser) -> str:
    sentence, _, _ = " ".join((parser.description or "").split()).partition(". ")
    return sentence.partition(": ")[0].rstrip(".")
