"""When a reply ends, and what of it may be shown: end tokens, stop texts, the limit of new tokens.

Left out: sampling, and which tokens end a turn (the tokenizer knows).
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Literal, Protocol

from minicpm.errors import ConfigError

FinishReason = Literal["stop", "length", "cancelled", "failed"]


class Detokenizer(Protocol):
    """Text from ids one by one (`StreamDecoder`)."""

    def push(self, token_id: int, /) -> str:
        """The text that became certain with this token."""
        ...

    def finish(self) -> str:
        """The text that an unfinished character leaves."""
        ...


class StopTexts:
    """Passes text on up to the first stop text, which never shows, however the text is cut into pieces.

    Of several stop texts the one that is complete first counts; of those complete at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for `stops`; none at all lets everything pass.

        Raises:
            ConfigError: one of them is empty or not text.
        """
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ConfigError(f"a stop text must be text that is not empty, got {stop!r}")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return what may be shown now, and whether a stop text is complete; after that nothing may be pushed."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def finish(self) -> str:
        """Return what was held back, now that no stop text can become complete."""
        text, self._held = self._held, ""
        return text

    def _num_held(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop text begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class Ending:
    """The text of one reply as its tokens come, and why it ends."""

    def __init__(
        self,
        detokenizer: Detokenizer | None,
        *,
        end_ids: AbstractSet[int],
        stops: Sequence[str],
        max_new_tokens: int,
    ) -> None:
        """Begin an empty reply.

        Args:
            detokenizer: None for a reply without text.
            end_ids: tokens that end the reply; they have no text.
            stops: texts that end the reply before them.
            max_new_tokens: the limit, end token included.

        Raises:
            ConfigError: an empty stop text, or stop texts without text to find them in.
        """
        if detokenizer is None and stops:
            raise ConfigError(f"the stop texts {list(stops)} need a tokenizer, and this engine has none")
        self._detokenizer = detokenizer
        self._end_ids = end_ids
        self._stops = StopTexts(stops)
        self._num_left = max_new_tokens

    def is_end(self, token_id: int) -> bool:
        """Whether this token ends the reply."""
        return token_id in self._end_ids

    def push(self, token_id: int, *, is_complete: bool = False) -> tuple[str, FinishReason | None]:
        """Return the text that may be shown with this token, and why the reply ends here, None if it goes on.

        With `is_complete` nothing can follow, and it ends as if an end token had come.
        """
        self._num_left -= 1
        if self.is_end(token_id):
            return self._finish("", "stop")
        text = self._detokenizer.push(token_id) if self._detokenizer else ""
        if is_complete:
            return self._finish(text, "stop")
        if self._num_left <= 0:
            return self._finish(text, "length")
        text, is_stopped = self._stops.push(text)
        return text, "stop" if is_stopped else None

    def _finish(self, text: str, reason: FinishReason) -> tuple[str, FinishReason]:
        text += self._detokenizer.finish() if self._detokenizer else ""
        shown, is_stopped = self._stops.push(text)
        return (shown, "stop") if is_stopped else (shown + self._stops.finish(), reason)
