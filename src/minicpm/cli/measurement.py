"""Works to time, and what timing them says: the numbers of `minicpm bench`.

What this leaves out: options and the table (`bench.py`), the steps themselves (`engine/speed.py`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minicpm import _native
from minicpm.cli.energy import EnergyMeter
from minicpm.cli.llama_bench import LlamaBench
from minicpm.engine.decoder import Decoder
from minicpm.engine.sizing import free_memory, kv_value_bytes
from minicpm.engine.speed import (
    PREFILL_ROWS,
    Stopwatch,
    decode_bytes,
    decode_operations,
    prefill_operations,
)
from minicpm.errors import EngineError

# Beyond any cache that a laptop has, so that the memory itself is measured.
_READ_BYTES = 1 << 30
# A feed-forward layer of the 2B model and a long prompt, as float32: the product that numpy's library does best.
_PRODUCT = (512, 2304, 5760)


@dataclass(frozen=True)
class Work:
    """Something to time: a prompt of `num_tokens`, or as many steps of `batch` sequences after `context` positions."""

    phase: str
    num_tokens: int
    context: int = 0
    batch: int = 1

    @property
    def label(self) -> str:
        """Its name in the table."""
        if self.phase == "prefill":
            return f"prefill {self.num_tokens}"
        return f"decode, context {self.context}" + (f", batch {self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True)
class Speed:
    """Medians of one `Work`.

    `bandwidth_share` is of the memory's read rate, `product_share` of numpy's float32 product, which quantized kernels
    may pass; joules and the peer are None where there is no counter and no peer.
    """

    work: Work
    tokens_per_second: float
    bytes_per_second: float
    bandwidth_share: float
    operations_per_second: float
    product_share: float
    joules_per_token: float | None
    peer_tokens_per_second: float | None

    @property
    def ratio(self) -> float | None:
        """Ours to the peer's; more is better."""
        return self.tokens_per_second / self.peer_tokens_per_second if self.peer_tokens_per_second else None


class Machine:
    """What the machine can do with `num_threads` threads, measured beside every work: a slow moment slows both."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._bytes = min(_READ_BYTES, free_memory() // 4) // 4096 * 4096
        if not self._bytes:
            raise EngineError("no free memory to measure its bandwidth with; close something and try again")
        rows, inner, columns = _PRODUCT
        self._left, self._right = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
        self._read_rates: list[float] = []
        self._product_rates: list[float] = []

    def measure(self) -> None:
        """Take one more sample of both figures."""
        self._read_rates.append(_native.read_bandwidth(self._bytes, self.num_threads))
        begin = time.perf_counter()
        self._left @ self._right
        self._product_rates.append(2.0 * float(np.prod(_PRODUCT)) / (time.perf_counter() - begin))

    @property
    def read_rate(self) -> float:
        """Bytes per second of reading memory, huge pages and prefetch, median."""
        return statistics.median(self._read_rates)

    @property
    def product_rate(self) -> float:
        """Operations per second of numpy's float32 matrix product, on as many threads as its library likes, median."""
        return statistics.median(self._product_rates)


def measure(
    work: Work, decoder: Decoder, weight_bytes: int, machine: Machine, peer: LlamaBench | None, rounds: int
) -> Speed:
    """Time `work` for `rounds` rounds, the machine's figures and the peer taking turns with it.

    Args:
        work: what to time; the cache of `decoder` must hold it.
        decoder: ours.
        weight_bytes: of `engine.speed.streamed_bytes`.
        machine: takes samples too.
        peer: None for ours alone.
        rounds: of which the medians count.
    """
    watch, energy = Stopwatch(decoder), EnergyMeter()
    once = _runner(work, watch)
    num_bytes, operations = _demand(work, decoder, weight_bytes)
    if work.context:
        watch.prefill(work.context)
    seconds, joules, theirs = [], [], []
    for _ in range(rounds):
        machine.measure()
        energy.start()
        seconds.append(once())
        joules.append(energy.joules())
        theirs.append(_peer_speed(peer, work))
    took, tokens = statistics.median(seconds), work.num_tokens * work.batch
    energies, speeds = [j for j in joules if j is not None], [s for s in theirs if s is not None]
    return Speed(
        work,
        tokens_per_second=tokens / took,
        bytes_per_second=num_bytes / took,
        bandwidth_share=num_bytes / took / machine.read_rate,
        operations_per_second=operations / took,
        product_share=operations / took / machine.product_rate,
        joules_per_token=statistics.median(energies) / tokens if energies else None,
        peer_tokens_per_second=statistics.median(speeds) if speeds else None,
    )


def _runner(work: Work, watch: Stopwatch) -> Callable[[], float]:
    if work.phase == "prefill":
        return lambda: watch.prefill(work.num_tokens)
    return lambda: watch.decode(work.num_tokens, work.context, work.batch)


def _demand(work: Work, decoder: Decoder, weight_bytes: int) -> tuple[float, float]:
    """Return the bytes that must be read and the operations that must be done."""
    if work.phase == "prefill":
        num_steps = -(-work.num_tokens // PREFILL_ROWS)
        return float(num_steps * weight_bytes), prefill_operations(decoder.config, work.num_tokens)
    middle, value_bytes = work.context + work.num_tokens / 2, kv_value_bytes(decoder.config, decoder.kv_type)
    step = decode_bytes(weight_bytes, decoder.config, middle, work.batch, value_bytes)
    return work.num_tokens * step, work.num_tokens * decode_operations(decoder.config, work.batch)


def _peer_speed(peer: LlamaBench | None, work: Work) -> float | None:
    if peer is None or (work.batch > 1 and not peer.can_batch):
        return None
    if work.phase == "prefill":
        return peer.prefill(work.num_tokens)
    if work.batch > 1:
        return peer.decode_batch(work.num_tokens, work.batch)
    return peer.decode(work.num_tokens, work.context)
