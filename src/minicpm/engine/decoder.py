"""`Decoder`: a model's weights in the layout of this machine's kernels, and steps over rows of many sequences.

What this leaves out: which blocks belong to whom, what runs next and how a token is chosen (the rest of `engine`); the
arithmetic (`native/`).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from minicpm import _native
from minicpm.architecture import ModelConfig
from minicpm.errors import EngineError
from minicpm.formats.mapped_file import is_mapped
from minicpm.formats.weight import Weight

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Forces a kernel by name; for tests, which run every kernel that the machine has.
KERNEL_VARIABLE = "MINICPM_KERNEL"
# To be raised when the bytes of a cache block come to mean something else: files hold them.
_LAYOUT_VERSION = 1
# Weights whose rows had to be reordered are copies; this much of them waits to be repacked.
_MAX_COPIED_BYTES = 32 << 20


class Decoder:
    """Runs the decoder graph of `config` on the CPU.

    Weights are repacked once, here, and not referred to afterwards. Results of one kernel do not depend on the number
    of threads, nor on what other rows a step has, to the last bit.

    Args:
        config: the model's shape and scales.
        weights: HF names to weights in HF row order; a tied head has none.
        num_threads: default is the number of processors that this process may use.
        num_blocks: blocks of the KV cache; memory is taken as they are first written.
        block_tokens: positions per block, a multiple of 32.
        kernel: a name of `features()["kernels"]`; default is the best one.
        kv_type: how keys and values are kept, "f16", "bf16", "f32", or "q8": bytes with one scale for each position and
            head, about half of f16's memory; default is f32 where the layers' weights are floats, whose exactness half
            precision would spoil, and f16 where they are quantized.
        num_positions: the longest sequence that will be run. Only the `dynamic` rope scaling looks at it; 0 lets it
            follow each sequence's length, as transformers does.

    `dtypes` says in one line what the file holds and what is computed in what.

    Raises:
        EngineError: a weight is missing or has the wrong shape or block type, or a setting is out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        *,
        num_threads: int | None = None,
        num_blocks: int,
        block_tokens: int = 32,
        kernel: str | None = None,
        kv_type: str | None = None,
        num_positions: int = 0,
    ) -> None:
        self.config = config
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self._num_positions = num_positions
        rope = config.rope_scaling
        self._is_dynamic = rope is not None and rope.rope_type == "dynamic"
        self._frequencies = self._frequencies_for(num_positions)
        kernel = kernel or os.environ.get(KERNEL_VARIABLE, "")
        threads = available_processors() if num_threads is None else num_threads
        self.kv_type = kv_type or default_kv_type(weights)
        self.dtypes = _describe_dtypes(weights, self.kv_type)
        with _EngineErrors():
            self._native = _native.Decoder(_shape(config), kernel, threads, num_blocks, block_tokens, self.kv_type)
        self._load(weights)

    @property
    def kernel(self) -> str:
        """The name of the kernel that was chosen."""
        return self._native.kernel

    @property
    def num_threads(self) -> int:
        """How many threads a step uses."""
        return self._native.num_threads

    @property
    def weight_bytes(self) -> int:
        """Bytes of the repacked weights."""
        return self._native.weight_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache once every block was written."""
        return self._native.cache_bytes

    def step(
        self,
        tokens: Ints,
        positions: Ints,
        sequences: Ints,
        block_tables: Ints,
        output_rows: Ints,
        outputs: Literal["logits", "hidden"] = "logits",
    ) -> Floats:
        """Compute rows of several sequences, prefill and decode mixed; one step runs at a time.

        Row n is token `tokens[n]` at `positions[n]` of sequence `sequences[n]`; rows of one sequence stand together at
        consecutive positions. The key and value of position p go to slot p % block_tokens of block
        `block_tables[s][p // block_tokens]`, and a row attends to positions 0 … p, which earlier steps wrote.

        Args:
            tokens: int32 (N,).
            positions: int32 (N,).
            sequences: int32 (N,), rows of `block_tables`.
            block_tables: int32 (num_sequences, max_blocks).
            output_rows: int32 (M,), rows of this step whose results are wanted; only for these does the head run.
            outputs: "logits", or "hidden" for the states after the last norm, before the head's divisor.

        Returns:
            float32 (M, vocab_size) or (M, hidden_size).

        Raises:
            EngineError: an index is out of range; nothing was computed.
            KeyboardInterrupt: Ctrl-C; the same step may be run again.
        """
        if outputs not in ("logits", "hidden"):
            raise EngineError(f"outputs must be 'logits' or 'hidden', got {outputs!r}")
        width = self.config.vocab_size if outputs == "logits" else self.config.hidden_size
        out = np.empty((len(output_rows), width), np.float32)
        tables = _ints("block_tables", block_tables, 2)
        rows = _ints("tokens", tokens), _ints("positions", positions), _ints("sequences", sequences)
        frequencies = self._frequencies
        if self._is_dynamic:
            frequencies = self._dynamic_frequencies(rows[1], rows[2], len(tables))
        wanted = _ints("output_rows", output_rows)
        with _EngineErrors():
            self._native.step(*rows, tables, frequencies, wanted, outputs == "logits", out)
        return out

    @property
    def cache_layout(self) -> str:
        """What the bytes of a block mean, in one line; equal layouts may exchange blocks."""
        config = self.config
        turns = zlib.crc32(self._frequencies.tobytes())
        shape = f"{config.num_hidden_layers}x{config.num_key_value_heads}x{config.head_dim}x{self.block_tokens}"
        return f"{_LAYOUT_VERSION} {self.kv_type} {shape} {turns:08x}"

    @property
    def block_bytes(self) -> int:
        """Bytes of the keys and values of one block, all layers together."""
        return self._native.block_bytes

    def read_blocks(self, blocks: Ints) -> Bytes:
        """Return a copy of cache blocks, uint8 (n, block_bytes).

        Raises:
            EngineError: no such block.
        """
        out = np.empty((len(blocks), self.block_bytes), np.uint8)
        with _EngineErrors():
            self._native.read_blocks(_ints("blocks", blocks), out)
        return out

    def write_blocks(self, blocks: Ints, data: Bytes) -> None:
        """Put `data`, uint8 (n, block_bytes), into cache blocks.

        Raises:
            EngineError: no such block, or data of another size; nothing was written.
        """
        with _EngineErrors():
            self._native.write_blocks(_ints("blocks", blocks), np.ascontiguousarray(data))

    def _frequencies_for(self, num_positions: int) -> Floats:
        return np.array([self.config.rope_frequencies(num_positions)], np.float32)

    def _dynamic_frequencies(self, positions: Ints, sequences: Ints, num_sequences: int) -> Floats:
        """Frequencies (num_sequences, head_dim/2), each for the length that its sequence has after this step."""
        lengths = np.zeros(num_sequences, np.int64)
        inside = (sequences >= 0) & (sequences < num_sequences)
        np.maximum.at(lengths, sequences[inside], positions[inside].astype(np.int64) + 1)
        return np.concatenate([self._frequencies_for(max(int(n), self._num_positions)) for n in lengths])

    def _load(self, weights: Mapping[str, Weight]) -> None:
        """Have all weights repacked in few calls, each of which leaves the interpreter to other threads."""
        held: list[Bytes] = []
        copied_bytes = 0
        for name, shape in self.config.weight_shapes().items():
            data = self._add(name, shape, weights)
            if data is None:
                continue
            held.append(data)
            copied_bytes += 0 if is_mapped(data) else data.nbytes
            if copied_bytes > _MAX_COPIED_BYTES:
                self._native.pack()
                held.clear()
                copied_bytes = 0
        self._native.pack()

    def _add(self, name: str, shape: tuple[int, ...], weights: Mapping[str, Weight]) -> Bytes | None:
        """Hand one weight over; return the bytes that must be kept until they are repacked."""
        if name not in weights:
            raise EngineError(f"weight {name} is missing; the model needs {shape}")
        weight = weights[name]
        if weight.shape != shape:
            raise EngineError(f"weight {name} has shape {weight.shape}; the model needs {shape}")
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else -1
        with _EngineErrors(f"weight {name}: "):
            if len(shape) == 1:
                self._native.set_norm(parts[-2], layer, np.ascontiguousarray(weight.decode()))
                return None
            data = np.ascontiguousarray(weight.data)
            self._native.add_matrix(parts[-2], layer, weight.block_type, data, shape[1], is_mapped(data))
            return data


def default_kv_type(weights: Mapping[str, Weight]) -> str:
    """Return how keys and values are kept unless asked otherwise: exactly where the weights are exact."""
    first = weights.get("model.layers.0.self_attn.k_proj.weight")
    return "f32" if first is not None and first.block_type in ("F32", "F16", "BF16") else "f16"


def _describe_dtypes(weights: Mapping[str, Weight], kv_type: str) -> str:
    """Return one line about what the file holds and what is computed in what, so that no dtype is silent."""
    first = weights.get("model.layers.0.self_attn.k_proj.weight")
    held = first.block_type if first is not None else "F32"
    inputs = "fp32" if held in ("F32", "F16", "BF16") else "16-bit integers"
    return f"file {held.lower()}, activations {inputs}, KV cache {kv_type}, rope/norm/softmax/logits fp32"


def available_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _EngineErrors:
    """Turns the native part's refusals into `EngineError`."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | MemoryError):
            text = "not enough memory" if isinstance(error, MemoryError) else str(error)
            raise EngineError(self.prefix + text) from None


def _ints(name: str, array: Any, num_axes: int = 1) -> Ints:
    given = np.asarray(array)
    if given.ndim != num_axes or (given.size and given.dtype.kind not in "iu"):
        raise EngineError(f"{name} must be whole numbers with {num_axes} axes, got {given.dtype} {given.shape}")
    if given.size and given.dtype != np.int32 and (given.min() < -(2**31) or given.max() >= 2**31):
        raise EngineError(f"{name} has numbers that do not fit 32 bits")
    return np.ascontiguousarray(given, np.int32)


def _shape(config: ModelConfig) -> dict[str, float]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rms_norm_eps",
        "scale_emb",
        "residual_scale",
        "logit_divisor",
        "attention_scale",
    )
    return {name: getattr(config, name) for name in names}
