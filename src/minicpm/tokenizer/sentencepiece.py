"""Reads a SentencePiece `.model` file without a protobuf library; every length is checked before it is used.

Left out: unigram, word and character models, and SentencePiece's own whitespace rules: what these models were trained
with is the fast tokenizer built on the same file, which prepends one `▁` and keeps all whitespace.
Source: sentencepiece_model.proto of google/sentencepiece for the field numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from minicpm.errors import FormatError
from minicpm.tokenizer.vocabulary import TokenType, Vocabulary, ending_ids

MAX_FILE_BYTES = 1 << 28
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_FLOAT = struct.Struct("<f")

Field = tuple[int, int | bytes]


def read_sentencepiece(path: Path, *, prepends_space: bool = True, adds_bos: bool | None = None) -> Vocabulary:
    """The vocabulary of a SentencePiece BPE model.

    Args:
        path: the `.model` file.
        prepends_space: whether text gets a leading `▁`; true for the fast tokenizer, whatever the file says.
        adds_bos: whether sequences begin with bos; by default if there is one.

    Raises:
        FormatError: the file is broken, or is no BPE model; names the byte offset.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise FormatError(f"{path} has {size} bytes; a SentencePiece model has at most {MAX_FILE_BYTES}")
    return _Parser(path.read_bytes(), path.name).vocabulary(prepends_space, adds_bos)


class _Parser:
    def __init__(self, data: bytes, name: str) -> None:
        self.data = data
        self.name = name
        self.pieces: list[str] = []
        self.scores: list[float] = []
        self.types: list[int] = []

    def fail(self, at: int, message: str) -> FormatError:
        return FormatError(f"{self.name}: at byte {at}: {message}; this is no SentencePiece model or it is damaged")

    def vocabulary(self, prepends_space: bool, adds_bos: bool | None) -> Vocabulary:
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        at = self._read_plain_pieces()
        for start, stop, number, value in self._fields(at, len(self.data)):
            if number == _PIECES and isinstance(value, bytes):
                self._read_piece(start, stop)
            elif number in (_TRAINER, _NORMALIZER) and isinstance(value, bytes):
                found = trainer if number == _TRAINER else normalizer
                found.update((n, v) for _, _, n, v in self._fields(start, stop))
        model_type = trainer.get(3, 1)
        if model_type != 2:
            kind = _MODEL_TYPES.get(model_type, model_type) if isinstance(model_type, int) else "broken"
            raise FormatError(f"{self.name} is a SentencePiece {kind} model; only BPE models are supported")
        charsmap = normalizer.get(2, b"")
        bos, eos, unk, pad = (self._id(trainer, n, default) for n, default in ((41, 1), (42, 2), (40, 0), (43, -1)))
        return Vocabulary(
            kind="llama",
            pieces=self.pieces,
            types=self.types,
            scores=self.scores,
            bos_id=bos,
            eos_id=eos,
            end_ids=ending_ids(self.pieces, self.types),
            pad_id=pad,
            unk_id=unk,
            adds_bos=bos is not None if adds_bos is None else adds_bos,
            prepends_space=prepends_space,
            charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        )

    def _id(self, trainer: dict[int, int | bytes], number: int, default: int) -> int | None:
        value = trainer.get(number, default)
        # A negative number is written as its 64-bit two's complement, and means "none".
        return value if isinstance(value, int) and 0 <= value < len(self.pieces) else None

    def _read_plain_pieces(self) -> int:
        """Read pieces as long as they have the usual short layout; return where the first other field begins.

        A vocabulary has 10⁵ of them, so this loop looks at bytes directly instead of at fields.
        """
        data, at, end = self.data, 0, len(self.data)
        unpack = _FLOAT.unpack_from
        try:
            # tag 1, length, tag 1, length, text, tag 2 (float), score, and sometimes tag 3, type.
            while at + 4 <= end and data[at] == 0x0A and data[at + 1] < 0x80 and data[at + 2] == 0x0A:
                stop, text_end = at + 2 + data[at + 1], at + 4 + data[at + 3]
                rest = stop - text_end
                if stop > end or data[at + 3] >= 0x80 or rest not in (5, 7) or data[text_end] != 0x15:
                    break
                kind = 1
                if rest == 7:
                    kind = data[stop - 1]
                    if data[stop - 2] != 0x18 or not 1 <= kind <= 6:
                        break
                self.pieces.append(data[at + 4 : text_end].decode())
                self.scores.append(unpack(data, text_end + 1)[0])
                self.types.append(kind)
                at = stop
        except UnicodeDecodeError as error:
            raise self.fail(at, "a piece is not UTF-8") from error
        return at

    def _read_piece(self, start: int, stop: int) -> None:
        text, score, kind = b"", 0.0, int(TokenType.NORMAL)
        for _, _, number, value in self._fields(start, stop):
            if number == 1 and isinstance(value, bytes):
                text = value
            elif number == 2 and isinstance(value, bytes) and len(value) == 4:
                score = _FLOAT.unpack(value)[0]
            elif number == 3 and isinstance(value, int):
                kind = value
        try:
            self.pieces.append(text.decode())
        except UnicodeDecodeError as error:
            raise self.fail(start, "a piece is not UTF-8") from error
        if not 1 <= kind <= 6:
            raise self.fail(start, f"a piece of unknown type {kind}")
        self.scores.append(score)
        self.types.append(kind)

    def _fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int | bytes]]:
        """`(start, stop, number, value)` of each field; numbers as int, everything else as bytes."""
        while at < end:
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if wire == _VARINT:
                start = at
                value, at = self._varint(at, end)
                yield start, at, number, value
                continue
            if wire == _BYTES:
                length, at = self._varint(at, end)
            elif wire in (_FIXED32, _FIXED64):
                length = 4 if wire == _FIXED32 else 8
            else:
                raise self.fail(at, f"unknown wire type {wire}")
            if length > end - at:
                raise self.fail(at, f"a field of {length} bytes where {end - at} are left")
            yield at, at + length, number, self.data[at : at + length]
            at += length

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 64:
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
        raise self.fail(at, "an unfinished number")
