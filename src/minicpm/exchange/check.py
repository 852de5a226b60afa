"""Whether what was written is what was meant: bytes by hash, and both models on one fixed text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from minicpm.errors import CheckpointError
from minicpm.exchange.agreement import Agreement, agreement
from minicpm.exchange.backends import EngineBackend
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.mapped_file import release
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry
from minicpm.tokenizer import Tokenizer

# English, Chinese and code, so that a broken row of the vocabulary has a chance to show; written for this purpose.
TEXT = """The lighthouse keeper wrote down the weather every evening for forty years. When the automatic lamp came, he
kept writing, because the sea did not care who watched it. His granddaughter still has the 14,600 pages.
清晨的集市上,卖豆腐的老人总是第一个到。他说,豆子要在天亮以前磨好,味道才不会走样。2024年他把手艺教给了邻居家的孩子。
def running_mean(values, window):
    total = 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        yield total / min(i + 1, window)
"""


class HashedEntries:
    """Weights that are hashed as they are made, so that reading back needs no second copy of the work."""

    def __init__(self, entries: Mapping[str, WeightEntry]) -> None:
        self.digests: dict[str, str] = {}
        self.entries = {name: self._hashed(name, entry) for name, entry in entries.items()}

    def _hashed(self, name: str, entry: WeightEntry) -> WeightEntry:
        def make() -> Weight:
            weight = entry.make()
            self.digests[name] = digest(weight)
            return weight

        return WeightEntry(entry.shape, entry.block_type, make)


def digest(weight: Weight) -> str:
    """Return a hash of the weight's bytes, rows in order; a mapped file's memory is given back."""
    hasher = hashlib.blake2b(digest_size=16)
    step = max(1, (1 << 24) // max(1, weight.data.shape[1]))
    for start in range(0, weight.data.shape[0], step):
        hasher.update(weight.data[start : start + step].tobytes())
    release(weight.data)
    return hasher.hexdigest()


def check_bytes(path: Path, digests: Mapping[str, str]) -> None:
    """Return when the model at `path` holds exactly the weights that were hashed while it was written.

    Raises:
        CheckpointError: naming the weights that differ.
    """
    weights = open_checkpoint(path).weights
    wrong = [name for name in weights if name in digests and digest(weights[name]) != digests[name]]
    if wrong:
        raise CheckpointError(f"{path} reads back differently: {', '.join(wrong[:8])}; the disk may be failing")


def check_outputs(source: Path, result: Path, tokenizer: Tokenizer) -> Agreement:
    """Return how the model at `result` differs from that at `source` on `TEXT`, both run by our engine.

    One model is in memory at a time.
    """
    ids = tokenizer.add_bos(tokenizer.encode(TEXT))
    before = EngineBackend(str(source)).score(ids)
    return agreement(before, EngineBackend(str(result)).score(ids))
