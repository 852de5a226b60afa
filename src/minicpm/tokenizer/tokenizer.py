"""The tokenizer: text to ids and back, with control tokens readable only where the caller says so.

Left out: training a vocabulary, and which rows are supervised (`chat.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from minicpm.errors import DataError, FormatError
from minicpm.tokenizer import backend as backends
from minicpm.tokenizer.merges import merges_from_scores
from minicpm.tokenizer.segments import ControlMatcher, Spans
from minicpm.tokenizer.stream import StreamDecoder
from minicpm.tokenizer.token_bytes import TokenBytes
from minicpm.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from minicpm.tokenizer.template import ChatTemplate

Message = Mapping[str, Any]


class ChatOptions(TypedDict, total=False):
    """What `ChatTemplate.render` takes beside the messages."""

    add_generation_prompt: bool
    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any] | None


TemplateSource = str | Mapping[str, str] | None


class Tokenizer:
    """Text ↔ token ids of one model, its special ids, and its chat template. Safe to share between threads."""

    def __init__(self, backend: Backend, vocabulary: Vocabulary, template: TemplateSource = None) -> None:
        """Join the parts; use `from_gguf`, `from_folder`, `from_json` or `from_sentencepiece` instead.

        Args:
            backend: the machine of `tokenizers`; it is set to read control tokens as plain text.
            vocabulary: the facts that belong to it.
            template: Jinja source of the chat template, or several by name; None for the model family's default.
        """
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocabulary = vocabulary
        self._template_source = template
        self._bytes = TokenBytes(vocabulary)

    # ------------------------------------------------------------------ from files

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """The tokenizer of a GGUF, from its metadata mapping.

        Raises:
            FormatError: the vocabulary is missing, broken or of an unsupported kind.
        """
        from minicpm.tokenizer.gguf_vocabulary import read_template, read_vocabulary

        vocabulary, merges = read_vocabulary(metadata)
        return cls.from_vocabulary(vocabulary, merges, read_template(metadata))

    @classmethod
    def from_vocabulary(
        cls, vocabulary: Vocabulary, merges: Sequence[tuple[str, str]] = (), template: TemplateSource = None
    ) -> Self:
        """The tokenizer of a vocabulary; the merges of the kind `llama` follow from its scores.

        Raises:
            FormatError: pieces and merges do not fit together.
        """
        if vocabulary.kind == "llama":
            if vocabulary.scores is None:
                raise FormatError("a SentencePiece vocabulary needs scores; this one has none")
            ids = backends.index_pieces(vocabulary.pieces)
            merges = merges_from_scores(vocabulary.pieces, vocabulary.types, vocabulary.scores, ids)
        return cls(backends.build_backend(vocabulary, merges), vocabulary, template)

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
        except UnicodeEncodeError:
            return [self.encode(text) for text in texts]
        return [encoding.ids for encoding in encodings]

    def encode_spans(self, text: str, trusted: Spans) -> list[int]:
        """The ids of `text`, where control tokens are read inside the trusted spans only.

        Args:
            text: any text.
            trusted: ascending, disjoint `(start, stop)` of what may hold control tokens.
        """
        ids: list[int] = []
        for start, stop, token_id in self._controls.split(text, trusted):
            if token_id is None:
                ids += self._encode_plain(text[start:stop], is_start=start == 0)
            else:
                ids.append(token_id)
        return ids

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

    # ------------------------------------------------------------------ facts

    @property
    def num_tokens(self) -> int:
        """The number of ids."""
        return len(self.vocabulary.pieces)

    @property
    def vocab_size(self) -> int:
        """The number of ids (the name that configurations use)."""
        return len(self.vocabulary.pieces)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a sequence, if there is one."""
        return self.vocabulary.bos_id

    @property
    def adds_bos(self) -> bool:
        """Whether the model expects every sequence to begin with `bos_id`."""
        return self.vocabulary.adds_bos

    @functools.cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends generation: end of text, end of turn, and what the generation settings name."""
        eos = self.vocabulary.eos_id
        return self.vocabulary.end_ids | (frozenset() if eos is None else {eos})

    @property
    def pad_id(self) -> int | None:
        """The padding id, if there is one."""
        return self.vocabulary.pad_id

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of control tokens and of the unknown token, which have no text of their own."""
        return self.vocabulary.control_ids

    # ------------------------------------------------------------------ chat

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template, or the default of its family.

        Raises:
            FormatError: the template is not valid Jinja; names the line.
        """
        from minicpm.tokenizer.template import ChatTemplate, default_template

        texts = {}
        for name in ("bos", "eos", "unk", "pad"):
            token_id = getattr(self.vocabulary, f"{name}_id")
            texts[f"{name}_token"] = "" if token_id is None else self.vocabulary.pieces[token_id]
        return ChatTemplate(self._template_source or default_template(self.vocabulary), texts)

    def apply_chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """The ids of a conversation, with exactly one bos where the model wants one.

        Only text that the template itself wrote can become a control token; what messages hold is plain text.

        Args:
            messages: mappings with `role` and `content`.
            **options: `add_generation_prompt` (default true), `tools`, `variables`, as in `ChatTemplate.render`.

        Raises:
            DataError: a message is malformed, or the template refuses the conversation.
            FormatError: the template fails.
        """
        text = self.chat_template.render(messages, **options)
        return self.add_bos(self.encode_spans(text, text.trusted_spans))

    def render_chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> str:
        """The text of a conversation as the template writes it, for display: encode with `apply_chat`, not from it."""
        return str.__str__(self.chat_template.render(messages, **options))

    def add_bos(self, ids: list[int]) -> list[int]:
        """`ids` with bos in front, if the model wants one and it is not there yet."""
        if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    # ------------------------------------------------------------------ inside

    def _encode_plain(self, text: str, *, is_start: bool) -> list[int]:
        if not is_start and self._prefixes_start_only:
            return self._run(self._unprefixed, text)
        return self._run(self._backend, text)

    @staticmethod
    def _run(backend: Backend, text: str) -> list[int]:
        try:
            encoding = backend.encode(text, add_special_tokens=False)
        except UnicodeEncodeError:
            # Joins surrogate pairs and replaces lone ones, which JSON can carry and UTF-8 cannot.
            whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            encoding = backend.encode(whole, add_special_tokens=False)
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
