"""What the rendering of one chat template may spend: steps, characters, nested values, processor time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import SecurityError

MAX_STEPS = 4_000_000
MAX_SECONDS = 5.0
MAX_NODES = 1 << 20
# The room of one item of a list: an object with its pointer, against one to four bytes for a character.
ITEM_CHARACTERS = 32


class Budget:
    """What one rendering may still spend."""

    def __init__(self, max_characters: int) -> None:
        self.max_characters = max_characters
        self.characters = 64 * max_characters
        self.steps = MAX_STEPS
        self.deadline = time.thread_time() + MAX_SECONDS

    def spend(self, steps: int = 1) -> None:
        """Take `steps` and look at the clock."""
        self.steps -= steps
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        if time.thread_time() > self.deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")

    def allow(self, characters: int) -> None:
        """Take room for a new text of this length, before it is made."""
        if characters > self.max_characters:
            raise SecurityError(f"it makes a text of {characters} characters; the limit is {self.max_characters}")
        self.characters -= characters
        if self.characters < 0:
            raise SecurityError("it makes too much text on the way to its result")

    def hold(self, value: Any) -> Any:
        """`value` again, after taking room for the text or the list that it newly is."""
        self.spend()
        if isinstance(value, str):
            self.allow(len(value))
        elif isinstance(value, (list, tuple)):
            self.allow(ITEM_CHARACTERS * len(value))
        return value

    def weigh(self, value: Any) -> Any:
        """`value` again, after counting what hangs below it (shared parts each time that they are reached)."""
        left, characters = MAX_NODES, 0
        stack = [value]
        while stack:
            item = stack.pop()
            left -= 1
            if left < 0:
                raise SecurityError(f"it nests more than {MAX_NODES} values")
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, Mapping):
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, (list, tuple)):
                if len(item) > left:
                    raise SecurityError(f"it nests more than {MAX_NODES} values")
                stack.extend(item)
        if characters > self.max_characters:
            raise SecurityError(f"it nests {characters} characters of text; the limit is {self.max_characters}")
        self.spend(1 + (MAX_NODES - left) // 16)
        return value
