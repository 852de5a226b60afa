"""The argument parser of every verb: argparse, whose complaints become one line with the nearest option.

argparse, not a library on top of it: the import takes a tenth of the time, and the first token of a one-shot chat
waits for it.
"""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from minicpm.errors import MiniCPMError

_MARK = "\0"


class UsageError(MiniCPMError):
    """The command line was not understood."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wide enough for an option and its default on one line; leaves the lines of the examples as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


class Parser(argparse.ArgumentParser):
    """The parser of the verb `name`; options and positional arguments may stand in any order."""

    def __init__(self, name: str, description: str, examples: Sequence[str] = ()) -> None:
        super().__init__(
            prog=f"minicpm {name}",
            description=textwrap.fill(description, 98),
            epilog="examples:\n" + "\n".join(f"  {line}" for line in examples) if examples else None,
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return what `arguments` say.

        Raises:
            UsageError: an unknown option (with the nearest one), a missing or extra argument, or a wrong value.
        """
        # Words after "--" are marked by a byte that no argument can hold: the parser below would read them as options.
        split = arguments.index("--") if "--" in arguments else len(arguments)
        marked = [*arguments[:split], *(_MARK + word for word in arguments[split + 1 :])]
        # Intermixed: plain argparse gives the second of two optional positional arguments up at the first option.
        found, unknown = self.parse_known_intermixed_args(marked)
        for word in unknown:
            if word.startswith("-"):
                self.error(f"unknown option {word.partition('=')[0]}{self._nearest(word.partition('=')[0])}")
        if unknown:
            extra = " ".join(repr(_unmarked(word)) for word in unknown)
            self.error(f"too many arguments: {extra}; put text with spaces in quotes")
        for name, value in vars(found).items():
            setattr(found, name, _unmarked(value))
        return found

    def error(self, message: str) -> NoReturn:
        """Raise `message` instead of printing a usage text of many lines."""
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def _nearest(self, option: str) -> str:
        known = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
        return f"; did you mean {near[0]}?" if near else ""


def _unmarked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmarked(item) for item in value]
    return value.removeprefix(_MARK) if isinstance(value, str) else value


def add_model(parser: argparse.ArgumentParser, **settings: Any) -> None:
    """Add the positional argument MODEL, which every verb on a model has."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name that `minicpm models` shows, a GGUF file, a checkpoint folder, or RUN@STEP",
        **settings,
    )
