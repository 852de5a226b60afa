"""Codecs of the float types and of the block types with one scale per 32 weights: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Encoders round to the nearest level and agree with the reference to the bit: the arithmetic is float32, and the inverse
of the *unrounded* scale maps weights to levels. What this leaves out: any choice of a scale by importance.

Source: ggml `ggml-quants.c` and `ggml-common.h` (block layouts), the Python package `gguf` (reference results).
"""

from __future__ import annotations

import numpy as np

from minicpm.formats.block_type import AnyArray, BlockType, Bytes, Floats, half_bytes, half_floats, inverse

WIDTH = 32
HALF = WIDTH // 2


def _decode_f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32)


def _encode_f32(values: Floats) -> Bytes:
    return values.astype("<f4").view(np.uint8)


def _encode_f16(values: Floats) -> Bytes:
    # Overflow becomes infinity here, as in every fp16 export; the converter checks for it and names the tensor.
    return values.astype("<f2").view(np.uint8)


def _decode_bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _encode_bf16(values: Floats) -> Bytes:
    bits = values.view(np.uint32)
    # Nearest even: the largest finite bit pattern plus the rounding term cannot pass 2^32.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if is_nan.any():
        # Truncation could turn a NaN into an infinity: set the quiet bit.
        rounded = np.where(is_nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return rounded.astype("<u2").view(np.uint8)


def join_nibbles(levels: Bytes) -> Bytes:
    """Return uint8 (n, 16): the first half of each block in the low nibbles, the second in the high ones."""
    low, high = levels[:, :HALF], levels[:, HALF:]
    return (low & np.uint8(15)) | (high << np.uint8(4))


def _split_nibbles(packed: Bytes) -> Bytes:
    levels = np.empty((packed.shape[0], WIDTH), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=levels[:, :HALF])
    np.right_shift(packed, np.uint8(4), out=levels[:, HALF:])
    return levels


def _to_levels(scaled: Floats, offset: float, top: int) -> Bytes:
    """Return trunc(scaled + offset) limited to 0..top; `scaled` is overwritten."""
    scaled += np.float32(offset)
    np.clip(scaled, 0, top, out=scaled)
    return scaled.astype(np.uint8)


def _symmetric_levels(values: Floats, top: int) -> tuple[Floats, Bytes]:
    """Return scale (n, 1) and levels 0..top around (top+1)/2; the largest weight gets level 0 and signs the scale."""
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)
    middle = (top + 1) // 2
    scale = largest / np.float32(-middle)
    return scale, _to_levels(values * inverse(scale), middle + 0.5, top)


def _affine_levels(values: Floats, top: int) -> tuple[Floats, Floats, Bytes]:
    """Return scale (n, 1), minimum (n, 1) and levels 0..top."""
    low = values.min(axis=1, keepdims=True)
    scale = (values.max(axis=1, keepdims=True) - low) / np.float32(top)
    return scale, low, _to_levels((values - low) * inverse(scale), 0.5, top)


def _encode_q8_0(values: Floats) -> Bytes:
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    head = half_bytes(scale, "Q8_0")
    scaled = values * inverse(scale)
    size = np.abs(scaled)
    whole = np.floor(size)
    # Halves go away from zero, as C's roundf does; size - whole is exact.
    whole += size - whole >= np.float32(0.5)
    return np.concatenate([head, np.copysign(whole, scaled).astype(np.int8).view(np.uint8)], axis=1)


def _decode_q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8) * half_floats(blocks[:, :2])


def _encode_q4_0(values: Floats) -> Bytes:
    scale, levels = _symmetric_levels(values, 15)
    return np.concatenate([half_bytes(scale, "Q4_0"), join_nibbles(levels)], axis=1)


def _decode_q4_0(blocks: Bytes) -> Floats:
    levels = _split_nibbles(blocks[:, 2:]).view(np.int8)
    levels -= np.int8(8)
    return levels * half_floats(blocks[:, :2])


def _encode_q4_1(values: Floats) -> Bytes:
    scale, low, levels = _affine_levels(values, 15)
    return np.concatenate([half_bytes(scale, "Q4_1"), half_bytes(low, "Q4_1"), join_nibbles(levels)], axis=1)


def _decode_affine(levels: Bytes, head: Bytes) -> Floats:
    scale_low = half_floats(head)
    values = levels * scale_low[:, :1]
    values += scale_low[:, 1:]
    return values


def _decode_q4_1(blocks: Bytes) -> Floats:
    return _decode_affine(_split_nibbles(blocks[:, 4:]), blocks[:, :4])


def fifth_bits(levels: Bytes) -> Bytes:
    """Return uint8 (n, 4): bit i of a block is the fifth bit of its level i."""
    return np.packbits(levels >> np.uint8(4), axis=1, bitorder="little")


def _join_fifth_bits(packed: Bytes, fifth: Bytes) -> Bytes:
    levels = _split_nibbles(packed)
    levels |= np.unpackbits(fifth, axis=1, bitorder="little") << np.uint8(4)
    return levels


def _encode_q5_0(values: Floats) -> Bytes:
    scale, levels = _symmetric_levels(values, 31)
    return np.concatenate([half_bytes(scale, "Q5_0"), fifth_bits(levels), join_nibbles(levels)], axis=1)


def _decode_q5_0(blocks: Bytes) -> Floats:
    levels = _join_fifth_bits(blocks[:, 6:], blocks[:, 2:6]).view(np.int8)
    levels -= np.int8(16)
    return levels * half_floats(blocks[:, :2])


def _encode_q5_1(values: Floats) -> Bytes:
    scale, low, levels = _affine_levels(values, 31)
    head: list[AnyArray] = [half_bytes(scale, "Q5_1"), half_bytes(low, "Q5_1")]
    return np.concatenate([*head, fifth_bits(levels), join_nibbles(levels)], axis=1)


def _decode_q5_1(blocks: Bytes) -> Floats:
    return _decode_affine(_join_fifth_bits(blocks[:, 8:], blocks[:, 4:8]), blocks[:, :4])


SIMPLE_BLOCK_TYPES = (
    BlockType("F32", 0, 1, 4, _decode_f32, _encode_f32),
    BlockType("F16", 1, 1, 2, half_floats, _encode_f16),
    BlockType("BF16", 30, 1, 2, _decode_bf16, _encode_bf16),
    BlockType("Q8_0", 8, 32, 34, _decode_q8_0, _encode_q8_0),
    BlockType("Q4_0", 2, 32, 18, _decode_q4_0, _encode_q4_0),
    BlockType("Q4_1", 3, 32, 20, _decode_q4_1, _encode_q4_1),
    BlockType("Q5_0", 6, 32, 22, _decode_q5_0, _encode_q5_0),
    BlockType("Q5_1", 7, 32, 24, _decode_q5_1, _encode_q5_1),
)
