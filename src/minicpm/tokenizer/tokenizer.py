"""The tokenizer of a model: from files and to files, its special ids, its chat.

Left out: training a vocabulary, and which rows are supervised (`chat.py`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from minicpm.tokenizer.backend import build_backend
from minicpm.tokenizer.codec import TokenCodec
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


# MiniCPM's turns are marked by plain text, which a model may go on to write itself.
_TURN_MARKS = ("<用户>", "<AI>")

TemplateSource = str | Mapping[str, str] | None


class Tokenizer(TokenCodec):
    """Text ↔ token ids of one model, its special ids, and its chat template. Safe to share between threads."""

    def __init__(self, backend: Backend, vocabulary: Vocabulary, template: TemplateSource = None) -> None:
        """Join the parts; use `from_gguf`, `from_folder`, `from_json` or `from_sentencepiece` instead.

        Args:
            backend: the machine of `tokenizers`; it is set to read control tokens as plain text.
            vocabulary: the facts that belong to it.
            template: Jinja source of the chat template, or several by name; None for the default of its family.
        """
        super().__init__(backend, vocabulary)
        self._template_source = template

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
    def from_folder(cls, path: str | os.PathLike[str]) -> Self:
        """The tokenizer of a model folder: `tokenizer.json` or else `tokenizer.model`, and the settings beside it.

        Raises:
            FormatError: no tokenizer, a broken one, or one of an unsupported kind.
        """
        from minicpm.tokenizer.folder import read_folder

        return cls(*read_folder(Path(path)))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """The tokenizer of a single `tokenizer.json`.

        Raises:
            FormatError: it is broken or of an unsupported kind.
        """
        from minicpm.tokenizer.folder import Settings
        from minicpm.tokenizer.json_vocabulary import read_tokenizer_json

        return cls(*read_tokenizer_json(Path(path), Settings()))

    @classmethod
    def from_sentencepiece(cls, path: str | os.PathLike[str]) -> Self:
        """The tokenizer of a single SentencePiece BPE file, behaving as the fast tokenizer that models train with.

        Text gets a leading `▁` at its start and after control tokens, whatever the file says about it.

        Raises:
            FormatError: it is broken or of an unsupported kind.
        """
        from minicpm.tokenizer.sentencepiece import read_sentencepiece

        return cls.from_vocabulary(read_sentencepiece(Path(path)))

    @classmethod
    def from_vocabulary(
        cls, vocabulary: Vocabulary, merges: Sequence[tuple[str, str]] = (), template: TemplateSource = None
    ) -> Self:
        """The tokenizer of a vocabulary; the merges of the kind `llama` follow from its scores.

        Raises:
            FormatError: pieces and merges do not fit together.
        """
        return cls(build_backend(vocabulary, merges), vocabulary, template)

    # ------------------------------------------------------------------ to files

    def to_json(self) -> str:
        """The text of an equivalent `tokenizer.json`."""
        return str(self._backend.to_str(pretty=True))

    def to_gguf_metadata(self) -> dict[str, Any]:
        """The `tokenizer.*` keys for a GGUF file, chat template included.

        Raises:
            FormatError: GGUF has no name for this vocabulary's pre-tokenizer.
        """
        from minicpm.tokenizer.exports import gguf_metadata

        return gguf_metadata(self._backend, self.vocabulary, self._template_source)

    # ------------------------------------------------------------------ facts

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

    @property
    def turn_marks(self) -> tuple[str, ...]:
        """Plain texts that begin a turn, where a reply must end; empty where control tokens mark turns."""
        return _TURN_MARKS if _TURN_MARKS[0] in self.chat_template.source else ()

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
