"""Near copies among many documents: MinHash sketches, found by bands, confirmed by the sketches.

Two texts whose sets of word 5-grams overlap by the share J (Jaccard) agree in each of 125 minima with probability J.
The minima are cut into 25 bands of 5; texts that agree in a whole band are compared (at J = 0.8 that finds all, at 0.7
99 %, at 0.5 55 %, at 0.3 6 %), and count as copies if the sketches' estimate of J reaches the threshold (its standard
error is about 0.04). What this leaves out: exact copies, which a set of hashes finds, and corpora whose sketches (325
bytes a document) do not fit in memory.

Source: Broder, "On the resemblance and containment of documents" (1997); b-bit minima: Li and König (2010).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minicpm.data.permutation import key_of, mix
from minicpm.data.words import hash_ngrams

NUM_BANDS = 25
BAND_SIZE = 5
NUM_MINIMA = NUM_BANDS * BAND_SIZE
_SHINGLE_WORDS = 5
_CHUNK = 1 << 10
_BAND_BASE = np.uint64(0xC2B2AE3D27D4EB4F)


class Sketch(NamedTuple):
    """What is kept of a document: uint64 (NUM_BANDS) and the low byte of every minimum, uint8 (NUM_MINIMA)."""

    bands: NDArray[np.uint64]
    minima: NDArray[np.uint8]


def sketch(words: NDArray[np.uint64]) -> Sketch:
    """Return the sketch of a document from the hashes of its words."""
    shingles = hash_ngrams(words, _SHINGLE_WORDS)
    factors, offsets = _hash_family()
    minima = np.full(NUM_MINIMA, np.iinfo(np.uint64).max, np.uint64)
    for first in range(0, len(shingles), _CHUNK):
        # (NUM_MINIMA, shingles); the high half of a product is the well-mixed one.
        hashed = shingles[first : first + _CHUNK] * factors[:, None] + offsets[:, None]
        minima = np.minimum(minima, hashed.min(axis=1))
    minima >>= np.uint64(32)
    grouped = minima.reshape(NUM_BANDS, BAND_SIZE)
    bands = np.arange(1, NUM_BANDS + 1, dtype=np.uint64)
    for i in range(BAND_SIZE):
        bands = bands * _BAND_BASE + grouped[:, i]
    return Sketch(mix(bands), minima.astype(np.uint8))


def find_copies(bands: NDArray[np.uint64], minima: NDArray[np.uint8], threshold: float) -> NDArray[np.int64]:
    """Return for each document the first one that it is a near copy of, itself if there is none.

    Args:
        bands: uint64 (documents, NUM_BANDS).
        minima: uint8 (documents, NUM_MINIMA).
        threshold: the estimated Jaccard similarity from which two documents are copies.

    Copies of copies are one group, whose first document stands for all.
    """
    first_of = np.arange(len(bands), dtype=np.int64)
    pairs = _candidates(bands)
    if not len(pairs):
        return first_of
    agreement = np.concatenate(
        [
            (minima[part[:, 0]] == minima[part[:, 1]]).mean(axis=1)
            for part in np.array_split(pairs, len(pairs) // 4096 + 1)
        ]
    )
    # Unequal minima share their low byte once in 256.
    similarity = (agreement - 1 / 256) / (1 - 1 / 256)
    parents = first_of.tolist()
    for one, other in pairs[similarity >= threshold].tolist():
        a, b = _root(parents, one), _root(parents, other)
        parents[max(a, b)] = min(a, b)
    return np.array([_root(parents, i) for i in range(len(parents))], np.int64)


def _candidates(bands: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the pairs (earlier, later) that share a band: each with its predecessor there, and with the first."""
    found = []
    for band in range(bands.shape[1]):
        order = np.argsort(bands[:, band], kind="stable")
        same = bands[order[1:], band] == bands[order[:-1], band]
        if not same.any():
            continue
        begins = np.concatenate([[True], ~same])
        first = order[begins][np.cumsum(begins) - 1]
        found.append(np.stack([order[:-1][same], order[1:][same]], axis=1))
        found.append(np.stack([first[1:][same], order[1:][same]], axis=1))
    return np.unique(np.concatenate(found), axis=0) if found else np.empty((0, 2), np.int64)


def _root(parents: list[int], index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return index


@functools.cache
def _hash_family() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    numbers = [key_of("minhash", i) for i in range(2 * NUM_MINIMA)]
    values = np.array(numbers, np.uint64)
    return values[:NUM_MINIMA] | np.uint64(1), values[NUM_MINIMA:]
