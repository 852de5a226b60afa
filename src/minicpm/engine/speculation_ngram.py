"""Drafts by prompt lookup: what followed the last time that the text ended as it does now.

The longest match counts. How far a match of some length may be trusted is learned from every token of a reply, whether
it was drafted or not, so that learning costs nothing.
Source: prompt lookup decoding (A. Saxena, 2023); lengths and trust are ours.
Left out: whether a draft pays (`speculation.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as Items

# Longer matches are all alike.
LONGEST_MATCH = 16
# Drafts less likely than this are not worth weighing.
LEAST_CHANCE = 0.02
# Earlier places with the same last two tokens that are looked at, newest first.
_NUM_PLACES = 16
# How often a match of 0, 1, … tokens foresaw the next one, in greedy replies of SmolLM2-135M to 50 prompts (passages
# to quote, code to edit, questions), and as how many observations that counts.
_FIRST_RATES = (0.0, 0.22, 0.48, 0.65, 0.68, 0.8, 0.8, 0.85, 0.87, 0.87, 0.88, 0.88, 0.88, 0.88, 0.9, 0.9, 0.97)
_FIRST_WEIGHT = 8.0
# The past counts half as much after so many observations.
_MEMORY = 256.0
# A reply that repeats less than others is found out against so many tokens as foreseen, and the past of it counts half
# after so many.
_OWN_WEIGHT, _OWN_MEMORY = 3.0, 24.0


class Trust:
    """How often matches of each length, up to `LONGEST_MATCH`, foresaw the next token."""

    def __init__(self) -> None:
        self._hits = [rate * _FIRST_WEIGHT for rate in _FIRST_RATES]
        self._trials = [_FIRST_WEIGHT] * len(_FIRST_RATES)

    def observe(self, length: int, is_hit: bool) -> None:
        """Count one token that a match of `length` foresaw, or not."""
        self._hits[length] += is_hit
        self._trials[length] += 1
        if self._trials[length] > _MEMORY:
            self._hits[length] /= 2
            self._trials[length] /= 2

    def rate(self, length: int) -> float:
        """The share of hits after a match of `length`, 0 to 1."""
        return self._hits[length] / self._trials[length]


class Lookup:
    """Where each pair of tokens of one growing sequence stood, and the earlier place that its end repeats now."""

    def __init__(self) -> None:
        self._num_read = 0
        self._after_pairs: dict[tuple[int, int], list[int]] = {}
        self._after_token: dict[int, int] = {}
        # The `_length` tokens before `_place` are also the last ones; the token there is foreseen.
        self._place = 0
        self._length = 0
        # Tokens of this reply that matches foresaw, and how many that should have been by what is known of all.
        self._hits = self._expected = _OWN_WEIGHT

    def read(self, ids: Items[int], num_prompt: int, trust: Trust) -> None:
        """Take in what has been added to `ids`; tokens from `num_prompt` on teach `trust`."""
        for at in range(self._num_read, len(ids)):
            if self._length:
                is_hit = ids[self._place] == ids[at]
                if at >= num_prompt:
                    self._observe(trust, is_hit)
                self._place += 1
                self._length = min(self._length + 1, LONGEST_MATCH) if is_hit else 0
            self._index(ids, at, is_wanted=at >= num_prompt - 1)
        self._num_read = len(ids)

    def draft(self, ids: Items[int], count: int, trust: Trust) -> tuple[list[int], list[float]]:
        """Return up to `count` foreseen tokens after `ids`, which were read, and how likely each is right.

        A token counts as right when those before it are right too, so the numbers fall; they end at `LEAST_CHANCE`.
        """
        tokens: list[int] = []
        chances: list[float] = []
        chance = min(1.0, self._hits / self._expected)
        if self._length:
            for i in range(count):
                chance *= trust.rate(min(self._length + i, LONGEST_MATCH))
                if chance < LEAST_CHANCE:
                    break
                place = self._place + i
                # Beyond the end the sequence repeats itself, and so does the draft.
                tokens.append(ids[place] if place < len(ids) else tokens[place - len(ids)])
                chances.append(chance)
        return tokens, chances

    def _observe(self, trust: Trust, is_hit: bool) -> None:
        self._hits += is_hit
        self._expected += trust.rate(self._length)
        if self._expected > _OWN_MEMORY:
            self._hits /= 2
            self._expected /= 2
        trust.observe(self._length, is_hit)

    def _index(self, ids: Items[int], at: int, *, is_wanted: bool) -> None:
        if at:
            places = self._after_pairs.setdefault((ids[at - 1], ids[at]), [])
            if is_wanted and not self._length:
                self._find(ids, at, places)
            places.append(at + 1)
        self._after_token[ids[at]] = at + 1

    def _find(self, ids: Items[int], at: int, places: list[int]) -> None:
        """Follow the place whose tokens before it agree with the end of `ids` up to `at` for the longest."""
        for place in places[: -_NUM_PLACES - 1 : -1]:
            length = 2
            while length < min(LONGEST_MATCH, place) and ids[place - 1 - length] == ids[at - length]:
                length += 1
            if length > self._length:
                self._place, self._length = place, length
        if not self._length and ids[at] in self._after_token:
            self._place, self._length = self._after_token[ids[at]], 1
