"""`Decoder`: a model's weights in the layout of this machine's kernels, and steps over rows of many sequences.

What this leaves out: which blocks belong to whom, what runs next and how a token is chosen (the rest of `engine`); the
arithmetic (`native/`).
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from minicpm import _native
from minicpm.architecture import ModelConfig
from minicpm.engine.dtypes import default_kv_type, describe_dtypes
from minicpm.engine.native_calls import EngineErrors, Ints, as_ints
from minicpm.errors import EngineError
from minicpm.formats.mapped_file import is_mapped
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import LazyWeights

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Forces a kernel by name; for tests, which run every kernel that the machine has.
KERNEL_VARIABLE = "MINICPM_KERNEL"
# To be raised when the bytes of a cache block come to mean something else: files hold them.
_LAYOUT_VERSION = 1
# Weights whose rows had to be reordered are copies; this much of them waits to be repacked.
_MAX_COPIED_BYTES = 32 << 20
# Rows of heads of a multiple of this width are put in order while they are repacked.
_REORDERED_ROWS = 32
_EMBEDDING = "model.embed_tokens.weight"
# How long a step may repack what opening left; a person waits for its token.
_CATCH_UP_SECONDS = 0.5


class Decoder:
    """Runs the decoder graph of `config` on the CPU.

    Weights are repacked once and not referred to afterwards. Results of one kernel do not depend on the number of
    threads, nor on what other rows a step has, nor on what is repacked already, to the last bit.

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
        is_lazy: whether weights of a mapped file may wait for `pack` or for later steps; the first step reads what is
            left from the file itself, so that no first token waits for new memory.

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
        is_lazy: bool = False,
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
        self.dtypes = describe_dtypes(weights, self.kv_type)
        with EngineErrors():
            self._native = _native.Decoder(_shape(config), kernel, threads, num_blocks, block_tokens, self.kv_type)
        # What must be kept until it is repacked.
        self._held: list[Bytes] = []
        self._has_stepped = False
        self._add_all(weights)
        self.pack(0.0 if is_lazy else math.inf)

    def pack(self, seconds: float = math.inf) -> bool:
        """Repack weights for about `seconds`; return whether all are repacked."""
        if self._held and self._native.pack(seconds):
            self._held.clear()
        return not self._held

    def pack_until_called(self) -> None:
        """Repack weights on this thread alone, without the interpreter, until another one calls `call`, or did."""
        self._native.pack_until_called()

    def call(self) -> None:
        """End `pack_until_called`."""
        self._native.call()

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
        tables = as_ints("block_tables", block_tables, 2)
        rows = as_ints("tokens", tokens), as_ints("positions", positions), as_ints("sequences", sequences)
        frequencies = self._frequencies
        if self._is_dynamic:
            frequencies = self._dynamic_frequencies(rows[1], rows[2], len(tables))
        wanted = as_ints("output_rows", output_rows)
        if self._has_stepped:
            self.pack(_CATCH_UP_SECONDS)
        self._has_stepped = True
        with EngineErrors():
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
        with EngineErrors():
            self._native.read_blocks(as_ints("blocks", blocks), out)
        return out

    def write_blocks(self, blocks: Ints, data: Bytes) -> None:
        """Put `data`, uint8 (n, block_bytes), into cache blocks.

        Raises:
            EngineError: no such block, or data of another size; nothing was written.
        """
        with EngineErrors():
            self._native.write_blocks(as_ints("blocks", blocks), np.ascontiguousarray(data))

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of one cache block into another.

        Raises:
            EngineError: no such block.
        """
        self.write_blocks(np.array([target], np.int32), self.read_blocks(np.array([source], np.int32)))

    def _frequencies_for(self, num_positions: int) -> Floats:
        return np.array([self.config.rope_frequencies(num_positions)], np.float32)

    def _dynamic_frequencies(self, positions: Ints, sequences: Ints, num_sequences: int) -> Floats:
        """Frequencies (num_sequences, head_dim/2), each for the length that its sequence has after this step."""
        lengths = np.zeros(num_sequences, np.int64)
        inside = (sequences >= 0) & (sequences < num_sequences)
        np.maximum.at(lengths, sequences[inside], positions[inside].astype(np.int64) + 1)
        return np.concatenate([self._frequencies_for(max(int(n), self._num_positions)) for n in lengths])

    def _add_all(self, weights: Mapping[str, Weight]) -> None:
        """Hand all weights over; of those that are copies, only few at a time wait to be repacked."""
        copied_bytes = 0
        # The head of most models, which is the largest, is needed for one row of a prompt only.
        for name, shape in sorted(self.config.weight_shapes().items(), key=lambda item: item[0] == _EMBEDDING):
            data = self._add(name, shape, weights)
            if data is None:
                continue
            self._held.append(data)
            copied_bytes += 0 if is_mapped(data) else data.nbytes
            if copied_bytes > _MAX_COPIED_BYTES:
                self._native.pack(0.0)
                self._held = [kept for kept in self._held if is_mapped(kept)]
                copied_bytes = 0

    def _add(self, name: str, shape: tuple[int, ...], weights: Mapping[str, Weight]) -> Bytes | None:
        """Hand one weight over; return the bytes that must be kept until they are repacked."""
        if name not in weights:
            raise EngineError(f"weight {name} is missing; the model needs {shape}")
        interleaved = None
        if isinstance(weights, LazyWeights) and self.config.head_dim % _REORDERED_ROWS == 0:
            interleaved = weights.interleaved(name)
        weight = weights[name] if interleaved is None else interleaved
        if weight.shape != shape:
            raise EngineError(f"weight {name} has shape {weight.shape}; the model needs {shape}")
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else -1
        with EngineErrors(f"weight {name}: "):
            if len(shape) == 1:
                self._native.set_norm(parts[-2], layer, np.ascontiguousarray(weight.decode()))
                return None
            data = np.ascontiguousarray(weight.data)
            head_width = 0 if interleaved is None else self.config.head_dim
            self._native.add_matrix(parts[-2], layer, weight.block_type, data, shape[1], is_mapped(data), head_width)
            return data


def available_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
