"""The conversation at a terminal: lines in, replies out, and commands that begin with a slash."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm.cli.conversation import Conversation
from minicpm.cli.pace import Pace
from minicpm.cli.reply import write_reply
from minicpm.cli.terminal import dim, note
from minicpm.errors import MiniCPMError

if TYPE_CHECKING:
    from minicpm.engine import LanguageModel

HELP = """\
/reset          forget the conversation (the system prompt stays)
/system TEXT    set the system prompt; without TEXT, show it; /system - removes it
/save FILE      keep the conversation in a JSON file
/load FILE      go on with a kept conversation
/stats          tokens, pace and memory so far
/help           this text
/exit           leave; so does Ctrl-D
A line that ends with \\ goes on in the next; \"\"\" begins and ends a text of many lines.
Ctrl-C stops a reply. A text that begins with / is sent when a space stands before it."""

_COMMAND = re.compile(r"/([A-Za-z]*)(?:\s+(.*))?", re.DOTALL)
_FENCE = '"""'
_PROMPT, _MORE = "> ", "… "


class Repl:
    """A conversation with `model`, which is called `name`; `settings` are keywords of the engine."""

    def __init__(self, model: LanguageModel, name: str, conversation: Conversation, settings: dict[str, Any]) -> None:
        self.model = model
        self.name = name
        self.conversation = conversation
        self.settings = settings
        self.pace = Pace()
        # Of the conversation as the model saw it last.
        self.token_ids: list[int] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset,
            "system": self._system,
            "save": self._save,
            "load": self._load,
            "stats": self._stats,
            "help": lambda _: note(HELP),
        }

    def run(self) -> None:
        """Read and answer until Ctrl-D or /exit."""
        note(f"{self.name}: {self.model.dtypes}; /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                text = read_message()
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                note(dim("\nCtrl-D leaves"))
                continue
            if text.strip() in {"/exit", "/quit", "/bye"}:
                return
            if not text.strip():
                continue
            try:
                self.answer(text)
            except MiniCPMError as error:
                note(f"error: {' '.join(str(error).split())}")

    def answer(self, text: str) -> None:
        """Run the command in `text`, or send it to the model and write the reply.

        Raises:
            MiniCPMError: the command or the message cannot be served; the conversation is as before.
        """
        match = _COMMAND.fullmatch(text.rstrip())
        if match is not None:
            self._run_command(match[1], (match[2] or "").strip())
            return
        stream = self.model.stream(text, history=self.conversation.messages(), **self.settings)
        reply = write_reply(stream)
        self.conversation.add(text, reply.text)
        self.token_ids = stream.token_ids
        line = self.pace.add(reply, stream.result.num_new_tokens)
        note(dim(line))

    def _run_command(self, name: str, rest: str) -> None:
        if name in self.commands:
            self.commands[name](rest)
            return
        near = difflib.get_close_matches(name, self.commands, n=1, cutoff=0.5)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        note(f"unknown command /{name}; {hint} To send it as text, put a space before it")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        note("the conversation is forgotten")

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.system = None if rest == "-" else rest
        note(f"system prompt: {self.conversation.system or 'that of the template'}")

    def _save(self, rest: str) -> None:
        if not rest:
            raise MiniCPMError("/save takes a file name, as in /save talk.json")
        path = Path(rest).expanduser()
        self.conversation.save(path, self.name)
        note(f"{len(self.conversation.history)} messages in {path}")

    def _load(self, rest: str) -> None:
        if not rest:
            raise MiniCPMError("/load takes a file name, as in /load talk.json")
        self.conversation = Conversation.load(Path(rest).expanduser())
        note(f"{len(self.conversation.history)} messages; system prompt: {self.conversation.system or 'none'}")

    def _stats(self, rest: str) -> None:
        note(self.pace.summary())


def read_message() -> str:
    """Return the next message from standard input: one line, or several by a backslash or between triple quotes.

    Raises:
        EOFError: the input has ended.
    """
    line = input(_PROMPT)
    if line.lstrip().startswith(_FENCE):
        first = line.lstrip().removeprefix(_FENCE)
        lines = [first]
        while _FENCE not in lines[-1]:
            lines.append(input(_MORE))
        lines[-1] = lines[-1].partition(_FENCE)[0]
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(_MORE))
    return "\n".join(lines)
