"""Text to ids and ids to text, with control tokens readable only where the caller says so.

Left out: files, special ids and chat (`tokenizer.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from minicpm.errors import DataError
from minicpm.tokenizer import backend as backends
from minicpm.tokenizer.segments import ControlMatcher, Segment, Spans
from minicpm.tokenizer.stream import StreamDecoder
from minicpm.tokenizer.token_bytes import TokenBytes
from minicpm.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class TokenCodec:
    """Text ↔ token ids of one vocabulary. Safe to share between threads."""

    def __init__(self, backend: Backend, vocabulary: Vocabulary) -> None:
        """Join the two; the machine is set to read control tokens as plain text, whole and unpadded.

        Args:
            backend: the machine of `tokenizers`.
            vocabulary: the facts that belong to it.
        """
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocabulary = vocabulary
        self._bytes = TokenBytes(vocabulary)

    @property
    def num_tokens(self) -> int:
        """The number of ids."""
        return len(self.vocabulary.pieces)

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of control tokens and of the unknown token, which have no text of their own."""
        return self.vocabulary.control_ids

    # ------------------------------------------------------------------ text to ids

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids of `text`, without bos or eos.

        Args:
            text: any text; lone surrogates become U+FFFD.
            allow_special: whether the text of a control token becomes that token. Never set it for text from users.
        """
        if allow_special:
            return self.encode_spans(text, [(0, len(text))])
        return self._encode_plain(text, is_start=True)

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        if allow_special:
            return [self.encode(text, allow_special=True) for text in texts]
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            encodings = self._backend.encode_batch_fast([_repair(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_spans(self, text: str, trusted: Spans) -> list[int]:
        """The ids of `text`, where control tokens are read inside the trusted spans only.

        Args:
            text: any text.
            trusted: ascending, disjoint `(start, stop)` of what may hold control tokens.
        """
        ids: list[int] = []
        for start, stop, token_id in self.split_spans(text, trusted):
            if token_id is None:
                ids += self._encode_plain(text[start:stop], is_start=start == 0)
            else:
                ids.append(token_id)
        return ids

    def split_spans(self, text: str, trusted: Spans) -> Iterator[Segment]:
        """`text` cut at the control tokens inside the trusted spans."""
        return self._controls.split(text, trusted)

    def encode_part(self, text: str) -> list[int]:
        """The ids of plain `text` that follows a control token."""
        return self._encode_plain(text, is_start=False)

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of plain `text` without the leading `▁` that the beginning of a text gets."""
        return self._run(self._unprefixed, text)

    # ------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; one leading space is dropped where encoding adds one, bytes that are no UTF-8 are U+FFFD.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        table, skipped = self._bytes, self.control_ids if skip_special else frozenset()
        try:
            data = b"".join([table[i] for i in ids if i not in skipped])
        except IndexError as error:
            raise DataError(f"a token id is outside the vocabulary of {self.num_tokens} tokens: {error}") from error
        text = data.decode("utf-8", "replace")
        return text.removeprefix(" ") if self.vocabulary.prepends_space else text

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes ids one by one and gives the same text as `decode`."""
        skipped = self.control_ids if skip_special else frozenset()
        return StreamDecoder(self._bytes, skipped, strips_space=self.vocabulary.prepends_space)

    def token_text(self, token_id: int) -> str:
        """The text of one token, for display: its leading space kept, a part of a character as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; a control token stands for its own text.

        Raises:
            DataError: the id is outside the vocabulary.
        """
        try:
            return self._bytes[token_id]
        except IndexError:
            raise DataError(f"token id {token_id} is outside the vocabulary of {self.num_tokens} tokens") from None

    def token_id(self, text: str) -> int | None:
        """The id of the token that the model file spells `text` (a control token, a piece), or None."""
        found: int | None = self._backend.token_to_id(text)
        return found

    # ------------------------------------------------------------------ inside

    def _encode_plain(self, text: str, *, is_start: bool) -> list[int]:
        if not is_start and self._prefixes_start_only:
            return self._run(self._unprefixed, text)
        return self._run(self._backend, text)

    @staticmethod
    def _run(backend: Backend, text: str) -> list[int]:
        try:
            encoding = backend.encode(text, add_special_tokens=False)
        except TypeError:
            encoding = backend.encode(_repair(text), add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    @functools.cached_property
    def _controls(self) -> ControlMatcher:
        return ControlMatcher(self._backend.get_added_tokens_decoder())

    @functools.cached_property
    def _prefixes_start_only(self) -> bool:
        from minicpm.tokenizer.pretokenizers import describe, members

        steps = members(describe(self._backend.pre_tokenizer), "pretokenizers")
        return any(step.get("prepend_scheme") == "first" for step in steps)

    @functools.cached_property
    def _unprefixed(self) -> Backend:
        if not self.vocabulary.prepends_space:
            return self._backend
        return backends.without_prefix(self._backend)


def _repair(text: str) -> str:
    """`text` with surrogate pairs joined and lone ones replaced: JSON can carry them, UTF-8 cannot.

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"text is expected, not {type(text).__name__}")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
