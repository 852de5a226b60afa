"""Text from tokens as they come: never half a character, and the same text as decoding all at once."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Set


class StreamDecoder:
    """Turns ids into text one by one, in constant time per token.

    The texts that `push` and `finish` return, joined, equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, token_bytes: Mapping[int, bytes], skipped_ids: Set[int], *, strips_space: bool) -> None:
        """Begin an empty text.

        Args:
            token_bytes: id → bytes; raises `IndexError` for an id outside the vocabulary.
            skipped_ids: ids that have no text (control tokens).
            strips_space: whether the first character is dropped if it is a space.
        """
        self._token_bytes = token_bytes
        self._skipped_ids = skipped_ids
        self._strips_space = strips_space
        # Keeps the bytes of an unfinished character; invalid bytes become U+FFFD as in a decode of the whole.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a character is unfinished.

        Raises:
            IndexError: the id is outside the vocabulary.
        """
        if token_id in self._skipped_ids:
            return ""
        return self._strip(self._utf8.decode(self._token_bytes[token_id]))

    def finish(self) -> str:
        """The rest: U+FFFD if the last character was never finished, else nothing. The decoder is then empty again."""
        text = self._strip(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        return text

    def _strip(self, text: str) -> str:
        if text and self._strips_space:
            self._strips_space = False
            return text.removeprefix(" ")
        return text
