"""Types of the compiled part; native/module.cpp defines it."""

from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

class Features(TypedDict):
    """Kernels that run on this machine, best first, and the instruction sets found."""

    kernels: list[str]
    instruction_sets: list[str]

def features() -> Features: ...
def find_merges(pieces: list[str], order: list[int], is_part: bytes) -> list[tuple[str, str]]:
    """Return, for each piece of `order`, every cut into two pieces that are parts, by the ids of the two."""

def trim_heap() -> None:
    """Give freed memory back to the system, where the C library would keep it."""

def read_bandwidth(num_bytes: int, num_threads: int, rounds: int = 3) -> float: ...

# Of the history's codec: cells and what comes before are uint16 or uint32, flat; rows uint8 (rows, 3).
def fit_cells(
    cells: npt.NDArray[Any], before: npt.NDArray[Any] | None, num_columns: int, base_error: float, coarseness: float
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int8], npt.NDArray[np.uint16]]: ...
def encode_cells(
    cells: npt.NDArray[Any],
    before: npt.NDArray[Any] | None,
    rows: npt.NDArray[np.uint8],
    columns: npt.NDArray[np.int8],
    within: npt.NDArray[np.uint16],
    base: npt.NDArray[Any],
) -> tuple[bytes, bytes]: ...
def decode_cells(
    base_layer: bytes,
    refinement: bytes | None,
    before: npt.NDArray[Any] | None,
    rows: npt.NDArray[np.uint8],
    columns: npt.NDArray[np.int8],
    within: npt.NDArray[np.uint16],
    base: npt.NDArray[Any],
    exact: npt.NDArray[Any] | None,
) -> None: ...

class Decoder:
    """The decoder graph; every array is C-contiguous. Raises ValueError for what `step` cannot run."""

    def __init__(
        self,
        shape: dict[str, float],
        kernel: str,
        num_threads: int,
        num_blocks: int,
        block_tokens: int,
        cache_type: str,
    ) -> None: ...
    def add_matrix(
        self,
        name: str,
        layer: int,
        block_type: str,
        data: npt.NDArray[np.uint8],
        columns: int,
        is_file: bool,
        interleaved_width: int,
    ) -> None:
        """Take `data`, which the caller keeps until it is packed; the pages of a mapped file are then given back.

        Unless `interleaved_width` is 0, rows 2j and 2j + 1 of each head of that width are its rows j and j + width / 2.
        """

    def pack(self, seconds: float) -> bool:
        """Pack copies, and files for about `seconds`, at least one unless that is 0; return whether all is packed."""

    def pack_until_called(self) -> None:
        """Pack on this thread alone, until another one calls `call`, once for all, or all is packed."""

    def call(self) -> None: ...
    def set_norm(self, name: str, layer: int, weight: npt.NDArray[np.float32]) -> None: ...
    def step(
        self,
        tokens: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        sequences: npt.NDArray[np.int32],
        block_tables: npt.NDArray[np.int32],
        frequencies: npt.NDArray[np.float32],
        output_rows: npt.NDArray[np.int32],
        wants_logits: bool,
        out: npt.NDArray[np.float32],
    ) -> None: ...
    def read_blocks(self, blocks: npt.NDArray[np.int32], out: npt.NDArray[np.uint8]) -> None: ...
    def write_blocks(self, blocks: npt.NDArray[np.int32], data: npt.NDArray[np.uint8]) -> None: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def kernel(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
