"""The bytes of every token, for decoding, streaming, log-probabilities and structured output."""

from __future__ import annotations

import functools
import re

from minicpm.tokenizer.vocabulary import SPACE_MARK, TokenType, Vocabulary

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary → that byte.

    Source: GPT-2's `bytes_to_unicode`: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TokenBytes(dict[int, bytes]):
    """Token id → its bytes, computed when first asked for. An id outside the vocabulary raises `IndexError`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary

    def __missing__(self, token_id: int) -> bytes:
        if token_id < 0:
            raise IndexError(token_id)
        data = self._compute(token_id)
        self[token_id] = data
        return data

    def _compute(self, token_id: int) -> bytes:
        vocabulary = self._vocabulary
        piece, kind = vocabulary.pieces[token_id], vocabulary.types[token_id]
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN) or token_id in vocabulary.added_ids:
            return piece.encode()
        if vocabulary.kind == "gpt2":
            table = byte_of_character()
            try:
                return bytes([table[character] for character in piece])
            except KeyError:
                return piece.encode()
        match = BYTE_PIECE.fullmatch(piece) if kind == TokenType.BYTE else None
        return bytes([int(match[1], 16)]) if match else piece.replace(SPACE_MARK, " ").encode()
