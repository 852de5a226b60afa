"""Builds the `tokenizers` machine for a vocabulary: byte-level BPE and SentencePiece BPE.

The machine is complete (decoder and post-processor too), so that its JSON form is a good `tokenizer.json`.
It is set to treat the text of control tokens as plain text; `Tokenizer` decides where a control token may be read.
Left out: unigram, WordPiece and word-level models, which no model of this family uses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minicpm.errors import FormatError
from minicpm.tokenizer.merges import merges_from_scores
from minicpm.tokenizer.pretokenizers import build_pre_tokenizer, members, takes_whole_words
from minicpm.tokenizer.vocabulary import SPACE_MARK, TokenType, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

Merges = Sequence[tuple[str, str]]


def build_backend(vocabulary: Vocabulary, merges: Merges) -> Backend:
    """The machine for `vocabulary`; `merges` in order of priority (for the kind `llama` they follow from the scores).

    Raises:
        FormatError: a piece occurs twice, or a merge names pieces that do not exist.
    """
    ids = index_pieces(vocabulary.pieces)
    if vocabulary.kind == "llama":
        if vocabulary.scores is None:
            raise FormatError("a SentencePiece vocabulary needs scores; this one has none")
        merges = merges_from_scores(vocabulary.pieces, vocabulary.types, vocabulary.scores)
    try:
        backend = _byte_level(vocabulary, ids, merges) if vocabulary.kind == "gpt2" else _spm(vocabulary, ids, merges)
    except FormatError:
        raise
    except Exception as error:
        # `tokenizers` raises a bare Exception for a merge that leads out of the vocabulary.
        raise FormatError(f"the vocabulary and its merges do not fit together: {error}") from error
    _add_tokens(backend, vocabulary)
    _add_sequence_ends(backend, vocabulary)
    backend.encode_special_tokens = True
    return backend


def index_pieces(pieces: Sequence[str]) -> dict[str, int]:
    """Piece → id.

    Raises:
        FormatError: two ids have the same piece.
    """
    ids = dict(zip(pieces, range(len(pieces)), strict=True))
    if len(ids) != len(pieces):
        twin = next(i for i, piece in enumerate(pieces) if ids[piece] != i)
        raise FormatError(f"tokens {twin} and {ids[pieces[twin]]} have the same text {pieces[twin]!r}")
    return ids


def _byte_level(vocabulary: Vocabulary, ids: dict[str, int], merges: Merges) -> Backend:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    pre = vocabulary.pre or "default"
    whole_words = takes_whole_words(pre)
    backend = Backend(models.BPE(vocab=ids, merges=list(merges), ignore_merges=whole_words))
    backend.pre_tokenizer = build_pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _spm(vocabulary: Vocabulary, ids: dict[str, int], merges: Merges) -> Backend:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    unknown = None if vocabulary.unk_id is None else vocabulary.pieces[vocabulary.unk_id]
    backend = Backend(
        models.BPE(
            vocab=ids,
            merges=list(merges),
            # A text is one word here: remembering it helps only who encodes the very same again, and costs 3 kB.
            cache_capacity=0,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in vocabulary.types,
        )
    )
    steps: list[Any] = []
    if vocabulary.charsmap:
        steps.append(normalizers.Precompiled(vocabulary.charsmap))
    if vocabulary.prepends_space:
        steps.append(normalizers.Prepend(SPACE_MARK))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_MARK)])
    undo: list[Any] = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.prepends_space:
        undo.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(undo)
    return backend


def _add_tokens(backend: Backend, vocabulary: Vocabulary) -> None:
    from tokenizers import AddedToken

    # The user-defined pieces of a SentencePiece model are not among the added ones: for the fast tokenizer that these
    # models were trained with they are ordinary vocabulary. Were they cut out, each line after a newline would begin
    # with an extra `▁`.
    special, plain = sorted(vocabulary.control_ids), sorted(vocabulary.added_ids)
    backend.add_special_tokens([AddedToken(vocabulary.pieces[i], special=True, normalized=False) for i in special])
    backend.add_tokens([AddedToken(vocabulary.pieces[i], special=False, normalized=False) for i in plain])


def _add_sequence_ends(backend: Backend, vocabulary: Vocabulary) -> None:
    from tokenizers import processors

    first = vocabulary.bos_id if vocabulary.adds_bos else None
    last = vocabulary.eos_id if vocabulary.adds_eos else None
    ends = {vocabulary.pieces[i]: i for i in (first, last) if i is not None}
    if not ends:
        return

    def one(sequence: str, type_id: int) -> list[dict[str, Any]]:
        framed: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        if first is not None:
            framed.insert(0, {"SpecialToken": {"id": vocabulary.pieces[first], "type_id": type_id}})
        if last is not None:
            framed.append({"SpecialToken": {"id": vocabulary.pieces[last], "type_id": type_id}})
        return framed

    # Set by its JSON form: the short notation of the constructor cannot hold a token with a colon in its text.
    state = {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1),
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in ends.items()},
    }
    processor = processors.TemplateProcessing()
    processor.__setstate__(json.dumps(state).encode())
    backend.post_processor = processor


def without_prefix(backend: Backend) -> Backend:
    """A copy of a machine that puts no `▁` before a text."""
    from tokenizers import Tokenizer as Backend

    state = json.loads(backend.to_str())
    for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        component = state.get(key)
        if not component:
            continue
        kept = [step for step in members(component, inner) if step.get("type") != "Prepend"]
        for step in kept:
            if step.get("type") == "Metaspace":
                step["prepend_scheme"] = "never"
            elif step.get("type") == "ByteLevel":
                step["add_prefix_space"] = False
        state[key] = {"type": "Sequence", inner: kept}
    copy = Backend.from_str(json.dumps(state))
    copy.encode_special_tokens = True
    return copy
