"""Text as a sequence of word hashes, for finding copies: one vectorised pass, no list of strings.

A word is a run of letters and digits in lower case; a Chinese or Japanese character is a word of its own, as is usual
where words are not separated. The hashes are the same on every machine. What this leaves out: meaning, stemming.
"""

from __future__ import annotations

import functools
from typing import cast

import numpy as np
from numpy.typing import NDArray

from minicpm.data.permutation import mix

_SEPARATOR, _LETTER, _IDEOGRAPH = 0, 1, 2
_TABLE_SIZE = 1 << 16
_IDEOGRAPHS = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF))
_MAX_WORD = 1 << 10
_BASE = np.uint64(0x9E3779B97F4A7C15)
_NGRAM_BASE = np.uint64(0xD6E8FEB86659FD93)


def hash_words(text: str) -> NDArray[np.uint64]:
    """Return one hash per word of `text`, in order."""
    kinds, lower = _tables()
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    inside = np.minimum(codes, _TABLE_SIZE - 1)
    kind = kinds[inside]
    kind[codes >= 0x20000] = _IDEOGRAPH
    letters = np.where(codes < _TABLE_SIZE, lower[inside], codes)
    is_word = kind != _SEPARATOR
    begins = is_word.copy()
    begins[1:] &= (kind[:-1] != _LETTER) | (kind[1:] != _LETTER)
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.empty(0, np.uint64)
    place = np.arange(len(codes)) - starts[np.maximum(np.cumsum(begins) - 1, 0)]
    # A word's hash is a polynomial over its letters; what lies between words adds nothing.
    terms = mix(letters.astype(np.uint64) + np.uint64(1)) * _powers()[place & (_MAX_WORD - 1)]
    terms[~is_word] = 0
    return mix(np.add.reduceat(terms, starts))


def hash_ngrams(words: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """Return one hash per run of `size` words; a shorter text that is not empty is one run."""
    size = min(size, len(words))
    if not size:
        return np.empty(0, np.uint64)
    count = len(words) - size + 1
    total = np.zeros(count, np.uint64)
    for i in range(size):
        total = total * _NGRAM_BASE + words[i : i + count]
    return mix(total)


def ideograph_share(text: str) -> float:
    """Return the share of ideographs (Chinese, Japanese) among letters."""
    kinds, _ = _tables()
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    kind = kinds[np.minimum(codes, _TABLE_SIZE - 1)]
    letters = int((kind != _SEPARATOR).sum())
    return int((kind == _IDEOGRAPH).sum()) / letters if letters else 0.0


@functools.cache
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    kinds = np.zeros(_TABLE_SIZE, np.uint8)
    lower = np.arange(_TABLE_SIZE, dtype=np.uint32)
    for code in range(_TABLE_SIZE):
        if 0xD800 <= code < 0xE000:
            continue
        character = chr(code)
        kinds[code] = _LETTER if character.isalnum() else _SEPARATOR
        small = character.lower()
        if len(small) == 1:
            lower[code] = ord(small)
    for first, last in _IDEOGRAPHS:
        kinds[first : last + 1] = _IDEOGRAPH
    # The last entry stands for all that is beyond the table: emoji and rare signs separate words.
    kinds[_TABLE_SIZE - 1] = _SEPARATOR
    return kinds, lower


@functools.cache
def _powers() -> NDArray[np.uint64]:
    return cast("NDArray[np.uint64]", np.cumprod(np.full(_MAX_WORD, _BASE, np.uint64)))
