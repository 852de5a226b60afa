"""A conversation that can be kept in a file: the system prompt and the messages of both sides."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicpm.errors import DataError

_ROLES = ("system", "user", "assistant")


@dataclass
class Conversation:
    """`history` holds {"role", "content"} of user and assistant, oldest first."""

    system: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """Return everything that the model is shown before the next message."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.history]

    def add(self, message: str, reply: str) -> None:
        """Append one exchange."""
        self.history += [{"role": "user", "content": message}, {"role": "assistant", "content": reply}]

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.history.clear()

    def save(self, path: Path, model: str) -> None:
        """Write the conversation with `model` to `path` as JSON.

        Raises:
            DataError: the file cannot be written.
        """
        text = json.dumps({"model": model, "messages": self.messages()}, indent=2, ensure_ascii=False)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Return the conversation in `path`: what `save` wrote, or a plain list of messages.

        Raises:
            DataError: unreadable, not JSON, or not a list of messages of the known roles.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        messages: Any = data.get("messages") if isinstance(data, dict) else data
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise DataError(f"{path} holds no conversation; expected a list of {{role, content}}, roles {_ROLES}")
        system = [m["content"] for m in messages if m["role"] == "system"]
        history = [{"role": m["role"], "content": m["content"]} for m in messages if m["role"] != "system"]
        return cls("\n".join(system) or None, history)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)
