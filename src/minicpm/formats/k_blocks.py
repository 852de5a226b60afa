"""Codecs of the super-block types Q4_K, Q5_K and Q6_K: 256 weights in sub-blocks whose scales are themselves rounded.

A sub-block's scale is searched: each of some twenty trial scales gives levels, and the least-squares scale (and
offset) of those levels is judged by its weighted squared error. Arrays in the search are (sub-block width,
sub-blocks), so that every sum runs over the slow axis. What this leaves out: importance matrices.

Source: ggml `ggml-common.h` (layouts) and `ggml-quants.c` (which errors are weighted how); the fit is written from
scratch.
"""

from __future__ import annotations

import numpy as np

from minicpm.formats.block_type import AnyArray, BlockType, Bytes, Floats, half_bytes, half_floats, inverse

SUPER = 256
AFFINE_WIDTH, NUM_AFFINE = 32, 8
SIGNED_WIDTH, NUM_SIGNED = 16, 16
_TINY = np.float32(1e-30)
_REFINEMENTS = 3


def _unpack_six_bits(packed: Bytes) -> tuple[Floats, Floats]:
    """Return the 8 scales and the 8 minima, float32 (n, 8) each, in uint8 (n, 12).

    Bytes 0-3 and 4-7 hold scales and minima 0-3 in their low six bits, bytes 8-11 the low nibbles of 4-7; the upper two
    bits of those lie in bits 6 and 7 of the first eight bytes.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def pack_six_bits(scales: Bytes, minima: Bytes) -> Bytes:
    """Return uint8 (n, 12) of scales and minima, uint8 (n, 8) each below 64: what `_unpack_six_bits` reads."""
    first: Bytes = scales[:, :4] | ((scales[:, 4:] >> np.uint8(4)) << np.uint8(6))
    second = minima[:, :4] | ((minima[:, 4:] >> np.uint8(4)) << np.uint8(6))
    return np.concatenate(
        [first, second, (scales[:, 4:] & np.uint8(15)) | ((minima[:, 4:] & np.uint8(15)) << np.uint8(4))], axis=1
    )


def join_nibbles(levels: Bytes) -> Bytes:
    """Return uint8 (n, 128): of each 64 weights, the first 32 in the low nibbles and the others in the high ones."""
    pairs = levels.reshape(-1, 4, 2, 32)
    packed: Bytes = (pairs[:, :, 0] & np.uint8(15)) | (pairs[:, :, 1] << np.uint8(4))
    return packed.reshape(-1, SUPER // 2)


def _split_nibbles(packed: Bytes) -> Bytes:
    levels = np.empty((packed.shape[0], 4, 2, 32), np.uint8)
    pairs = packed.reshape(-1, 4, 32)
    np.bitwise_and(pairs, np.uint8(15), out=levels[:, :, 0])
    np.right_shift(pairs, np.uint8(4), out=levels[:, :, 1])
    return levels.reshape(-1, NUM_AFFINE, AFFINE_WIDTH)


def _decode_affine(levels: Bytes, head: Bytes) -> Floats:
    """Return levels, uint8 (n, 8, 32), times their scales less their minima; `head` is the first 16 bytes."""
    units = half_floats(head[:, :4])
    scales, minima = _unpack_six_bits(head[:, 4:16])
    scales *= units[:, :1]
    minima *= units[:, 1:]
    values = levels * scales[:, :, None]
    values -= minima[:, :, None]
    return values.reshape(-1, SUPER)


def _decode_q4_k(blocks: Bytes) -> Floats:
    return _decode_affine(_split_nibbles(blocks[:, 16:]), blocks)


def _decode_q5_k(blocks: Bytes) -> Floats:
    levels = _split_nibbles(blocks[:, 48:])
    # Bit j of byte i is the fifth bit of weight i of sub-block j.
    fifth = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little")
    levels |= fifth.swapaxes(1, 2) << np.uint8(4)
    return _decode_affine(levels, blocks)


class _AffineFit:
    """The best `scale · level + offset` so far for sub-blocks less their lowest value, float32 (32, m)."""

    def __init__(self, values: Floats, top: int) -> None:
        self.top = np.float32(top)
        self.low = np.minimum(values.min(axis=0), np.float32(0))
        self.shifted = values - self.low
        # The weight of an error: as large as the weight itself, but not less than the sub-block's typical size.
        self.importance = np.sqrt(np.square(values).mean(axis=0)) + np.abs(values) + _TINY
        self.weighted = self.importance * self.shifted
        self.sum_w, self.sum_x = self.importance.sum(axis=0), self.weighted.sum(axis=0)
        self.sum_xx = np.multiply(self.weighted, self.shifted).sum(axis=0)
        self.width = self.shifted.max(axis=0)
        self.scale, self.offset = self.width / self.top, np.zeros_like(self.width)
        self.error = np.full_like(self.width, np.inf)
        self.levels, self.product = np.empty_like(values), np.empty_like(values)

    def try_step(self, step: float) -> None:
        """Try levels spaced so that `step` of them span the range."""
        np.multiply(self.shifted, np.float32(step) * inverse(self.width), out=self.levels)
        self._try_levels()

    def refine(self) -> None:
        """Try the levels nearest to the weights under the best scale and offset."""
        np.subtract(self.shifted, self.offset, out=self.levels)
        self.levels *= inverse(self.scale)
        self._try_levels()

    def _try_levels(self) -> None:
        levels, product = self.levels, self.product
        np.rint(levels, out=levels)
        np.clip(levels, 0, self.top, out=levels)
        np.multiply(self.weighted, levels, out=product)
        sum_xl = product.sum(axis=0)
        np.multiply(self.importance, levels, out=product)
        sum_l = product.sum(axis=0)
        product *= levels
        sum_ll = product.sum(axis=0)
        determinant = self.sum_w * sum_ll - sum_l * sum_l
        inverse_determinant = inverse(np.maximum(determinant, _TINY))
        scale = (self.sum_w * sum_xl - self.sum_x * sum_l) * inverse_determinant
        offset = (sum_ll * self.sum_x - sum_l * sum_xl) * inverse_determinant
        # The stored minimum cannot be negative: where the best offset would make it so, fit the scale alone.
        is_bound = (offset + self.low > 0) | (determinant <= 0)
        offset = np.where(is_bound, -self.low, offset)
        scale = np.where(is_bound, (sum_xl - offset * sum_l) * inverse(np.maximum(sum_ll, _TINY)), scale)
        error = self.sum_xx - 2 * (scale * sum_xl + offset * self.sum_x)
        error += scale * scale * sum_ll + 2 * scale * offset * sum_l + offset * offset * self.sum_w
        is_better = (error < self.error) & (scale > 0)
        np.copyto(self.error, error, where=is_better)
        np.copyto(self.scale, scale, where=is_better)
        np.copyto(self.offset, offset, where=is_better)


def _fit_affine(values: Floats, top: int, first_trial: float, num_trials: int) -> tuple[Floats, Floats]:
    """Return scale and minimum, both float32 (m,) and not negative, of the best `scale · level - minimum`.

    Args:
        values: float32 (32, m).
        top: the highest level.
        first_trial: the first trial spans the range with `top + first_trial` levels, each further one with 0.1 more.
        num_trials: how many.
    """
    fit = _AffineFit(values, top)
    for trial in range(num_trials):
        fit.try_step(top + first_trial + 0.1 * trial)
    for _ in range(_REFINEMENTS):
        fit.refine()
    return fit.scale, np.maximum(-(fit.low + fit.offset), 0)


def _encode_affine(values: Floats, name: str, top: int, first_trial: float, num_trials: int) -> tuple[Bytes, Bytes]:
    """Return the 16 bytes of scales, uint8 (n, 16), and the levels, uint8 (n, 256)."""
    n = values.shape[0]
    half_bytes(np.abs(values).max(axis=1, keepdims=True) / np.float32(top), name)  # refuses NaN and infinity
    columns = np.ascontiguousarray(values.reshape(-1, AFFINE_WIDTH).T)
    scale, minimum = (part.reshape(n, NUM_AFFINE) for part in _fit_affine(columns, top, first_trial, num_trials))
    units, sixths, exact = [], [], []
    for part in (scale, minimum):
        largest = part.max(axis=1, keepdims=True)
        unit = half_bytes(largest / np.float32(63), name)
        six = np.minimum(np.rint(part * (np.float32(63) * inverse(largest))), 63).astype(np.uint8)
        units.append(unit)
        sixths.append(six)
        exact.append((half_floats(unit) * six)[:, :, None])
    levels = values.reshape(n, NUM_AFFINE, AFFINE_WIDTH) + exact[1]
    levels *= inverse(exact[0])
    np.rint(levels, out=levels)
    np.clip(levels, 0, top, out=levels)
    head = np.concatenate([*units, pack_six_bits(sixths[0], sixths[1])], axis=1)
    return head, levels.astype(np.uint8).reshape(n, SUPER)


def fifth_bits(levels: Bytes) -> Bytes:
    """Return uint8 (n, 32) for levels (n, 256): bit j of byte i is the fifth bit of weight i of sub-block j."""
    fifth = np.packbits((levels >> 4).reshape(-1, NUM_AFFINE, AFFINE_WIDTH), axis=1, bitorder="little")
    return fifth.reshape(-1, AFFINE_WIDTH)


def _encode_q4_k(values: Floats) -> Bytes:
    head, levels = _encode_affine(values, "Q4_K", 15, -1.0, 21)
    return np.concatenate([head, join_nibbles(levels)], axis=1)


def _encode_q5_k(values: Floats) -> Bytes:
    head, levels = _encode_affine(values, "Q5_K", 31, -0.5, 16)
    return np.concatenate([head, fifth_bits(levels), join_nibbles(levels)], axis=1)


def _decode_q6_k(blocks: Bytes) -> Floats:
    n = blocks.shape[0]
    scales = blocks[:, 192:208].view(np.int8) * half_floats(blocks[:, 208:])
    levels = np.empty((n, 2, 4, 32), np.uint8)
    low = blocks[:, :128].reshape(n, 2, 2, 32)
    np.bitwise_and(low, np.uint8(15), out=levels[:, :, :2])
    np.right_shift(low, np.uint8(4), out=levels[:, :, 2:])
    high = blocks[:, 128:192].reshape(n, 2, 32)
    for quarter in range(4):
        levels[:, :, quarter] |= ((high >> np.uint8(2 * quarter)) & np.uint8(3)) << np.uint8(4)
    signed = levels.view(np.int8).reshape(n, NUM_SIGNED, SIGNED_WIDTH)
    signed -= np.int8(32)
    return (signed * scales[:, :, None]).reshape(n, SUPER)


def _fit_signed(values: Floats) -> Floats:
    """Return the scale, float32 (m,), of the best `scale · level` with levels -32..31 for float32 (16, m)."""
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=0)[None], axis=0)[0]
    importance = np.square(values)
    weighted = importance * values
    inverse_largest = inverse(largest)
    best_gain: Floats = np.zeros_like(largest)
    best_scale: Floats = np.zeros_like(largest)
    levels, product = np.empty_like(values), np.empty_like(values)
    for step in range(-9, 10):
        # The largest weight takes the level -32, or near it: that side has one level more.
        np.multiply(values, np.float32(-(32 + 0.1 * step)) * inverse_largest, out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, -32, 31, out=levels)
        np.multiply(weighted, levels, out=product)
        sum_xl = product.sum(axis=0)
        np.multiply(importance, levels, out=product)
        product *= levels
        scale = sum_xl * inverse(product.sum(axis=0))
        gain = scale * sum_xl
        is_better = gain > best_gain
        np.copyto(best_gain, gain, where=is_better)
        np.copyto(best_scale, scale, where=is_better)
    return best_scale


def _encode_q6_k(values: Floats) -> Bytes:
    n = values.shape[0]
    peak = np.abs(values).max(axis=1, keepdims=True)
    half_bytes(peak / np.float32(32 * 127), "Q6_K")  # refuses NaN and infinity
    # The search squares and cubes: bring each super-block to unit size first.
    unit = inverse(peak)
    columns = np.ascontiguousarray((values * unit).reshape(-1, SIGNED_WIDTH).T)
    scale = _fit_signed(columns).reshape(n, NUM_SIGNED) * peak
    largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1, keepdims=True), axis=1)
    head = half_bytes(largest / np.float32(-128), "Q6_K")
    eighths: AnyArray = np.clip(np.rint(scale * (np.float32(-128) * inverse(largest))), -128, 127).astype(np.int8)
    exact = (half_floats(head) * eighths)[:, :, None]
    rounded = values.reshape(n, NUM_SIGNED, SIGNED_WIDTH) * inverse(exact)
    np.rint(rounded, out=rounded)
    np.clip(rounded, -32, 31, out=rounded)
    rounded += np.float32(32)
    return np.concatenate([join_six_bits(rounded.astype(np.uint8)), eighths.view(np.uint8), head], axis=1)


def join_six_bits(levels: Bytes) -> Bytes:
    """Return uint8 (n, 192) for levels 0..63 of n blocks: 128 bytes of low nibbles, 64 of upper pairs of bits."""
    parts = levels.reshape(-1, 2, 4, 32)
    low = (parts[:, :, :2] & 15) | (parts[:, :, 2:] << 4)
    high = parts >> 4
    high = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64)], axis=1)


K_BLOCK_TYPES = (
    BlockType("Q4_K", 12, SUPER, 144, _decode_q4_k, _encode_q4_k),
    BlockType("Q5_K", 13, SUPER, 176, _decode_q5_k, _encode_q5_k),
    BlockType("Q6_K", 14, SUPER, 210, _decode_q6_k, _encode_q6_k),
)
