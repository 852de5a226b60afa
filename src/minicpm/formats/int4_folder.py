"""The packed 4-bit matrices of GPTQ and AWQ folders <-> weights in blocks; nothing is rounded either way.

A matrix is `scale · (level - zero)` with one half-precision scale and one 4-bit zero for each output and each group of
inputs, and inputs come first. Groups that are multiples of 32 become blocks that repeat their group's scale: Q4_0 where
every zero is 8, else Q5_0, whose levels hold every difference of two 4-bit numbers. Columns in act-order and other
widths are decoded to F32. What this leaves out: other bit widths, and AWQ's gemv layouts.

Source: AutoGPTQ `nn_modules/qlinear` (order, zeros stored less one), AutoAWQ `utils/packing_utils.py` (order).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minicpm.errors import CheckpointError, ConfigError, FormatError
from minicpm.formats import blocks, simple_blocks
from minicpm.formats.block_type import AnyArray, Bytes
from minicpm.formats.safetensors_read import SafetensorsFile
from minicpm.formats.typed_fields import TypedFields
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry

METHODS = ("gptq", "awq")
# Which of eight neighbours lies in which nibble of a word, the lowest first.
_ORDERS: Mapping[str, tuple[int, ...]] = {"gptq": (0, 1, 2, 3, 4, 5, 6, 7), "awq": (0, 2, 4, 6, 1, 3, 5, 7)}
WORD = 8
_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)
_MIDDLE = 8
_ONE = np.array([1.0], "<f2").view(np.uint8)
# Block type -> the level of the weight 0.
_ZERO_LEVELS: Mapping[str, int] = {"Q4_0": 8, "Q5_0": 16}


@dataclass(frozen=True, slots=True)
class Int4Layout:
    """How a folder packs its matrices.

    Attributes:
        method: one of `METHODS`; it says how words are laid, not how levels were chosen.
        group_size: inputs that share a scale; 0 for whole rows.
        zero_shift: what stored zeros lack, 1 in GPTQ's first version.
    """

    method: str
    group_size: int
    zero_shift: int

    @classmethod
    def of(cls, method: str, group_size: int) -> Int4Layout:
        """Return the layout that every reader of `method` knows."""
        return cls(method, group_size, 1 if method == "gptq" else 0)

    @classmethod
    def parse(cls, settings: Mapping[str, Any], where: str) -> Int4Layout:
        """Return the layout that a config.json's `quantization_config` names.

        Raises:
            ConfigError: another method, width or packing.
        """
        fields = TypedFields(settings, f"{where}: quantization_config")
        method, bits = settings.get("quant_method"), settings.get("bits", settings.get("w_bit"))
        order = str(settings.get("version" if method == "awq" else "checkpoint_format") or "").lower()
        known = {"gptq": ("", "gptq", "gptq_v2"), "awq": ("", "gemm")}.get(str(method))
        if known is None or bits != 4 or order not in known:
            raise ConfigError(
                f"{fields.where}: {method!r} with {bits!r} bits in the layout {order or 'default'!r} is not supported: "
                "GPTQ (gptq, gptq_v2) and AWQ (gemm) folders of 4 bits are read; GGUF holds other quantized types"
            )
        group_size = settings.get("group_size", settings.get("q_group_size", 128))
        shift = 1 if method == "gptq" and order != "gptq_v2" else 0
        return cls(str(method), 0 if group_size == -1 else fields.integer("group_size", 128), shift)

    def to_hf(self) -> dict[str, Any]:
        """Return what `quantization_config` says of a folder that `pack` wrote."""
        common: dict[str, Any] = {"quant_method": self.method, "bits": 4, "group_size": self.group_size}
        if self.method == "awq":
            return common | {"zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"]}
        return common | {"desc_act": False, "sym": True, "lm_head": False, "checkpoint_format": "gptq"}

    def tensors(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return suffix -> dtype and shape of what a matrix of `shape` (R, C) is stored as.

        Raises:
            ConfigError: columns that groups do not divide, or rows that words do not.
        """
        rows, columns = shape
        width = self.group_size or columns
        if columns % width or rows % WORD or width % WORD:
            raise ConfigError(
                f"a matrix of {rows} x {columns} cannot be packed in groups of {width}: "
                f"they must divide {columns}, and {WORD} must divide {rows}"
            )
        groups = columns // width
        is_awq = self.method == "awq"
        return {
            "qweight": ("I32", (columns, rows // WORD) if is_awq else (columns // WORD, rows)),
            "qzeros": ("I32", (groups, rows // WORD)),
            "scales": ("F16", (groups, rows)),
        } | ({} if is_awq else {"g_idx": ("I32", (columns,))})

    def pack(self, weight: Weight) -> dict[str, AnyArray]:
        """Return the tensors of a Q4_0 or Q5_0 matrix whose groups have one scale each.

        Raises:
            FormatError: blocks of a group that differ in scale, or levels further apart than 4 bits reach.
        """
        rows, columns = weight.shape
        width = self.group_size or columns
        scales, levels = _split(weight)
        grouped = scales.reshape(rows, columns // width, -1)
        if (grouped != grouped[:, :, :1]).any():
            raise FormatError(f"a {weight.block_type} matrix has several scales in one group of {width}")
        shaped = levels.reshape(rows, columns // width, width)
        zeros = np.clip(-shaped.min(axis=2), self.zero_shift, 15 + self.zero_shift)
        if weight.block_type == "Q4_0":
            zeros[:] = _MIDDLE
        shaped += zeros[:, :, None]
        if levels.min() < 0 or levels.max() > 15:
            raise FormatError(f"a {weight.block_type} matrix has groups whose levels need more than 4 bits")
        stored = (zeros - self.zero_shift).T & 15  # (groups, R)
        packed = {"qzeros": self._words(stored), "scales": np.ascontiguousarray(grouped[:, :, 0].T).view("<f2")}
        if self.method == "awq":
            return {"qweight": self._words(levels.T), **packed}
        index = (np.arange(columns) // width).astype("<i4")
        return {"qweight": np.ascontiguousarray(self._words(levels).T), **packed, "g_idx": index}

    def entry(self, tensors: Mapping[str, AnyArray], where: str) -> WeightEntry:
        """Return the matrix that `tensors` (by suffix) hold; zeros and order are looked at now, levels later.

        Raises:
            CheckpointError: tensors of other types or shapes than the layout has.
        """
        zeros, index = self._checked(tensors, where)
        rows, columns = zeros.shape[0], len(index)
        width = self.group_size or columns
        is_plain = width % simple_blocks.WIDTH == 0 and np.array_equal(index, np.arange(columns) // width)
        kind = ("Q4_0" if (zeros == _MIDDLE).all() else "Q5_0") if is_plain else "F32"
        return WeightEntry((rows, columns), kind, partial(self._unpack, tensors, zeros, index, kind))

    def _checked(self, tensors: Mapping[str, AnyArray], where: str) -> tuple[AnyArray, AnyArray]:
        """Return zeros int8 (R, groups) and the group of each column."""
        missing = {"qweight", "qzeros", "scales"} - tensors.keys()
        if missing:
            raise CheckpointError(f"{where}: {', '.join(sorted(missing))} missing")
        given = tensors["qweight"].shape
        if len(given) != 2:
            raise CheckpointError(f"{where}.qweight has {len(given)} axes, expected 2")
        is_awq = self.method == "awq"
        shape = (given[1] * WORD, given[0]) if is_awq else (given[1], given[0] * WORD)
        for suffix, (dtype, wanted) in self.tensors(shape).items():
            array = tensors.get(suffix)
            if array is None:
                continue
            kind = {"I32": np.dtype("<i4"), "F16": np.dtype("<f2")}[dtype]
            if array.shape != wanted or array.dtype != kind:
                raise CheckpointError(f"{where}.{suffix} is {array.dtype} {array.shape}, expected {kind} {wanted}")
        width = self.group_size or shape[1]
        index = tensors.get("g_idx", np.arange(shape[1]) // width)
        if index.min() < 0 or index.max() >= shape[1] // width:
            raise CheckpointError(f"{where}.g_idx names groups that are not there")
        return (self._levels(tensors["qzeros"]).T + np.int8(self.zero_shift)), index

    def _unpack(self, tensors: Mapping[str, AnyArray], zeros: AnyArray, index: AnyArray, kind: str) -> Weight:
        words = tensors["qweight"]
        levels = self._levels(words).T if self.method == "awq" else self._levels(np.ascontiguousarray(words.T))
        signed = levels - zeros[:, index]
        scales = tensors["scales"].T
        if kind == "F32":
            return Weight.from_array(signed * scales[:, index].astype(np.float32))
        return _join(kind, scales, signed)

    def _words(self, levels: AnyArray) -> AnyArray:
        """Return int32 (n, k) of levels 0..15 (n, 8k)."""
        eights = levels.reshape(len(levels), -1, WORD)[:, :, _ORDERS[self.method]].astype(np.uint32)
        words: AnyArray = np.bitwise_or.reduce(eights << _SHIFTS, axis=2).astype("<u4").view("<i4")
        return words

    def _levels(self, words: AnyArray) -> AnyArray:
        """Return int8 (n, 8k) of int32 (n, k)."""
        levels = np.empty((*words.shape, WORD), np.int8)
        unsigned = words.view("<u4")
        for shift, place in zip(_SHIFTS, _ORDERS[self.method], strict=True):
            levels[:, :, place] = (unsigned >> shift) & np.uint32(15)
        return levels.reshape(len(words), -1)


def _split(weight: Weight) -> tuple[AnyArray, AnyArray]:
    """Return the bits of each block's scale, uint16 (R, blocks), and the levels around 0, int8 (R, C)."""
    if weight.block_type not in _ZERO_LEVELS:
        raise FormatError(f"a {weight.block_type} matrix cannot be packed; {', '.join(_ZERO_LEVELS)} can")
    size = blocks.block_type(weight.block_type).block_bytes
    data = weight.data.reshape(weight.num_rows, -1, size)
    scales = np.ascontiguousarray(data[:, :, :2]).view("<u2")[:, :, 0]
    unit = data.copy()
    unit[:, :, :2] = _ONE
    return scales, blocks.decode(weight.block_type, unit.reshape(weight.data.shape)).astype(np.int8)


def _join(kind: str, scales: AnyArray, signed: AnyArray) -> Weight:
    """Return the weight of scales float16 (R, groups) and levels around 0, int8 (R, C)."""
    rows, columns = signed.shape
    num_blocks = columns // simple_blocks.WIDTH
    repeated = np.repeat(scales, num_blocks // scales.shape[1], axis=1).reshape(-1, 1)
    levels = (signed + np.int8(_ZERO_LEVELS[kind])).view(np.uint8).reshape(-1, simple_blocks.WIDTH)
    parts: list[Bytes] = [np.ascontiguousarray(repeated).view(np.uint8)]
    if kind == "Q5_0":
        parts.append(simple_blocks.fifth_bits(levels))
    data = np.concatenate([*parts, simple_blocks.join_nibbles(levels)], axis=1)
    return Weight(kind, (rows, columns), data.reshape(rows, -1))


def packed_entries(files: Mapping[str, SafetensorsFile], layout: Int4Layout) -> tuple[dict[str, WeightEntry], set[str]]:
    """Return the packed matrices of a folder under the names that they have whole, and the tensors' names read so.

    Raises:
        CheckpointError: a matrix of which something is missing or misshapen.
    """
    parts: dict[str, dict[str, AnyArray]] = defaultdict(dict)
    used = set()
    for name, file in files.items():
        stem, _, suffix = name.rpartition(".")
        if suffix in ("qweight", "qzeros", "scales", "g_idx"):
            parts[stem][suffix] = file.array(name)
            used.add(name)
    return {f"{stem}.weight": layout.entry(tensors, stem) for stem, tensors in parts.items()}, used
