"""The plain facts of a vocabulary: its pieces, their types, and the ids with a meaning of their own.

Every source (a GGUF's metadata, a `tokenizer.json`, a SentencePiece file) ends in one `Vocabulary`, and everything
that asks "is this a control token", "which ids end a turn" or "which bytes is this" asks it.
Left out: the algorithm that turns text into ids (`backend.py`).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Literal

from minicpm.errors import FormatError

Kind = Literal["gpt2", "llama"]

SPACE_MARK = "▁"

# Control tokens with these texts end a turn or a document in every model that has them. A file names one eos id, but
# instruction models also stop on another: what a file leaves out is found here, once, for chat, server and exports.
END_TEXTS = frozenset(
    {
        "</s>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|eos|>",
        "<|end_of_turn|>",
        "<end_of_turn>",
        "<EOT>",
    }
)


class TokenType(enum.IntEnum):
    """The token types of GGUF, which are those of SentencePiece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Pieces by id, and which ids mean what.

    Attributes:
        kind: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE), the names of GGUF.
        pieces: text of each id as the model file spells it (`Ġthe`, `▁the`, `<0x0A>`).
        types: one `TokenType` per id.
        scores: SentencePiece scores, for the kind `llama` where known.
        pre: GGUF's name of the pre-tokenizer, for the kind `gpt2` where known.
        bos_id: the id that begins a sequence, if there is one.
        eos_id: the id that ends a sequence, if there is one.
        end_ids: further ids that end generation.
        pad_id: the padding id, if there is one.
        added_ids: user-defined ids that are cut out of the text before anything else.
        unk_id: the id of unknown text, if there is one.
        adds_bos: whether a sequence begins with `bos_id`.
        adds_eos: whether a plain sequence ends with `eos_id`.
        prepends_space: whether text gets a leading `▁`, which decoding strips again.
        charsmap: SentencePiece's compiled text normalization; empty for identity.
    """

    kind: Kind
    pieces: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] | None = None
    pre: str | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    end_ids: frozenset[int] = frozenset()
    added_ids: frozenset[int] = frozenset()
    pad_id: int | None = None
    unk_id: int | None = None
    adds_bos: bool = False
    adds_eos: bool = False
    prepends_space: bool = False
    charsmap: bytes = b""

    def __post_init__(self) -> None:
        """Check that lengths agree and that every id lies inside.

        Raises:
            FormatError: names the field that does not fit.
        """
        size = len(self.pieces)
        if size == 0:
            raise FormatError("the vocabulary is empty; it must hold at least one token")
        if len(self.types) != size:
            raise FormatError(f"the vocabulary has {size} tokens but {len(self.types)} token types; they must agree")
        if self.scores is not None and len(self.scores) != size:
            raise FormatError(f"the vocabulary has {size} tokens but {len(self.scores)} scores; they must agree")
        named = {"bos": self.bos_id, "eos": self.eos_id, "padding": self.pad_id, "unknown": self.unk_id}
        for name, value in named.items():
            if value is not None and not 0 <= value < size:
                raise FormatError(f"the {name} token id {value} is outside the vocabulary of {size} tokens")
        for value in self.end_ids:
            if not 0 <= value < size:
                raise FormatError(f"the end-of-turn token id {value} is outside the vocabulary of {size} tokens")
        if self.adds_bos and self.bos_id is None:
            raise FormatError("the vocabulary asks for a bos token at the start but names no bos token id")

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that text typed by a user never becomes: control tokens and the unknown token."""
        return frozenset(find_ids(self.types, TokenType.CONTROL) + find_ids(self.types, TokenType.UNKNOWN))


def ending_ids(pieces: Sequence[str], types: Sequence[int]) -> frozenset[int]:
    """The ids of control tokens whose text ends a turn or a document (`END_TEXTS`)."""
    return frozenset(i for i in find_ids(types, TokenType.CONTROL) if i < len(pieces) and pieces[i] in END_TEXTS)


def find_ids(types: Sequence[int], wanted: TokenType) -> list[int]:
    """Return the ids of a type, of which a vocabulary may have 100,000 others."""
    number, found, at = int(wanted), list[int](), -1
    try:
        while True:
            at = types.index(number, at + 1)
            found.append(at)
    except ValueError:
        return found
