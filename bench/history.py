"""What checkpoints cost as a history: bytes, the base layer's quality, speed, memory.

Checkpoints of one run are coded each from the one before, as the history does, beside the ideal conditional entropy
(each cell given the exact checkpoint before: a normal or a Laplace distribution, whichever is better for the tensor,
with the best multiple of the row before and a scale of row × column, none of which costs anything), `zipnn` where it is
installed (else exponent and mantissa bytes apart under zstd), zstd -19 and XOR with the checkpoint before under zstd.
Every checkpoint is decoded and compared. Without --run, a model of 1 M parameters is trained for it. --large adds
three steps of the 2B shape.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from rows import Row, arguments, compare, finish, rounds_of, take_turns

from minicpm.architecture import PRESETS
from minicpm.data.shards import TokenShards
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.history.codec import Encoded, Reference, decode, encode
from minicpm.model.loading import load_model
from minicpm.train.checkpoint import read_manifest, step_folders

Cells = npt.NDArray[np.uint16]

# A reader goes through so many frames at most.
KEY_INTERVAL = 16
CORES = 2
THINNING = 10
KL_TOKENS = 4096
WINDOW = 256
LARGE_BOUND_BYTES = 1.5e9
PART_BYTES = 32 << 20
# The slow peers read every so many checkpoints.
SAMPLED = 6


@dataclass
class Totals:
    """Bytes of one stage's frames; those of key frames apart."""

    raw: int = 0
    base: int = 0
    exact: int = 0
    ideal: float = 0.0
    key_raw: int = 0
    key_base: int = 0
    key_exact: int = 0
    peers: dict[str, list[float]] = field(default_factory=dict)

    def with_keys(self, part: float, key_part: int) -> float:
        """Return the share of raw bf16 that other frames and key frames take together."""
        return (part + key_part) / (self.raw + self.key_raw)


def read_cells(folder: Path) -> dict[str, Cells]:
    weights = open_checkpoint(folder).weights
    return {
        name: np.ascontiguousarray(weight.data).view(np.uint16).reshape(weight.shape)
        for name, weight in weights.items()
        if weight.block_type == "BF16"
    }


def values_of(cells: Cells) -> npt.NDArray[np.float64]:
    return (cells.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def ideal_bytes(cells: Cells, before: Cells) -> float:
    """Bytes that the best of two distributions gives a tensor's cells, each as wide as its spacing."""
    if np.array_equal(cells, before):
        return 0.0
    x, p = (values_of(c).reshape(len(c) if c.ndim > 1 else 1, -1) for c in (cells, before))
    residual = x - (x * p).sum(1, keepdims=True) / np.maximum((p * p).sum(1, keepdims=True), 1e-30) * p
    size = np.abs(residual)
    row, column = np.ones((len(x), 1)), np.ones((1, x.shape[1]))
    for _ in range(5):
        row = np.maximum((size / column).mean(1, keepdims=True), 1e-12)
        if len(x) > 1:
            column = np.maximum((size / row).mean(0, keepdims=True), 1e-6)
    spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-40))) - 7)
    scale = row * column
    laplace = np.log2(2 * scale / spacing) + size / scale / np.log(2)
    scale = scale * np.sqrt((residual**2 / scale**2).mean())
    normal = np.log2(np.sqrt(2 * np.pi) * scale / spacing) + (residual / scale) ** 2 / 2 / np.log(2)
    return float(min(np.maximum(laplace, 0).sum(), np.maximum(normal, 0).sum())) / 8


def planes_zstd(data: bytes) -> bytes:
    planes = np.frombuffer(data, np.uint8).reshape(-1, 2).T
    return b"".join(zstandard.compress(np.ascontiguousarray(plane).tobytes(), 3) for plane in planes)


def fast_peer() -> tuple[str, Callable[[bytes], bytes]]:
    try:
        from zipnn import ZipNN
    except ImportError:
        print("zipnn is not installed: exponent and mantissa bytes apart under zstd stand in")
        return "planes+zstd", planes_zstd
    return "zipnn", lambda data: bytes(ZipNN(bytearray_dtype="bfloat16", input_format="byte").compress(bytearray(data)))


def joined(tensors: dict[str, Cells]) -> bytes:
    return b"".join(cells.tobytes() for cells in tensors.values())


class Chain:
    """The coded end of a history, one frame long."""

    def __init__(self) -> None:
        self.references: dict[str, Reference] = {}
        self.before: dict[str, Cells] = {}
        self._pool = ThreadPoolExecutor(CORES)

    def encode(self, tensors: dict[str, Cells], is_key: bool) -> dict[str, Encoded]:
        """Code a checkpoint on both cores."""
        # The largest first, so that no core waits for one at the end.
        names = sorted(tensors, key=lambda name: -tensors[name].size)
        old: dict[str, Reference] = {} if is_key else self.references
        coded = self._pool.map(lambda name: encode(tensors[name], old.get(name)), names)
        return dict(zip(names, coded, strict=True))

    def decode(self, coded: dict[str, Encoded], is_key: bool) -> dict[str, Cells]:
        """Decode what was coded from the same end, exactly."""

        def exact(name: str) -> Cells:
            c = coded[name]
            return decode(c.header, c.base, c.refinement, None if is_key else self.references.get(name))[0]

        return dict(zip(coded, self._pool.map(exact, coded), strict=True))

    def go_on(self, tensors: dict[str, Cells], coded: dict[str, Encoded]) -> None:
        """Make a checkpoint the end."""
        self.references = {name: c.reference for name, c in coded.items()}
        self.before = tensors


def sizes(coded: dict[str, Encoded]) -> tuple[int, int]:
    """Bytes of the base layer with headers, and of everything."""
    base = sum(len(c.header) + sum(map(len, c.base)) for c in coded.values())
    return base, base + sum(sum(map(len, c.refinement)) for c in coded.values())


class Divergence:
    """Mean KL, in nats a token, of base layers to the checkpoints that they stand for, on the run's held-out text."""

    def __init__(self, run: Path) -> None:
        rows = []
        for path in sorted((run / "data").glob("*.heldout")):
            shards = TokenShards.open(path)
            rows.append(shards.tokens(0, min(shards.num_tokens, KL_TOKENS)).astype(np.int64))
        share = max(WINDOW, KL_TOKENS // max(len(rows), 1) // WINDOW * WINDOW)
        ids = np.concatenate([row[: min(share, len(row) // WINDOW * WINDOW)] for row in rows])
        self._ids = torch.from_numpy(ids.reshape(-1, WINDOW))
        self.values: list[float] = []

    @torch.inference_mode()
    def add(self, folder: Path, base: dict[str, Cells]) -> None:
        """Measure one checkpoint whose base layer decodes to `base`."""
        checkpoint = open_checkpoint(folder)
        model = load_model(checkpoint.config, checkpoint.weights, dtype=torch.float32)
        exact = [model(row[None])[0].log_softmax(-1) for row in self._ids]
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(values_of(base[name]).astype(np.float32)))
        kl = [
            (p.exp() * (p - model(row[None])[0].log_softmax(-1))).sum(-1)
            for row, p in zip(self._ids, exact, strict=True)
        ]
        self.values.append(float(torch.cat(kl).mean()))
        print(f"{folder.name}: base layer, KL {self.values[-1]:.4f} nats a token", flush=True)


def measure(folders: list[Path], divergence: Divergence | None, name: str) -> dict[str, Totals]:
    """Code a run's checkpoints; return the bytes of each stage, warm-up left out."""
    stages: dict[str, Totals] = {}
    chain, (peer_name, peer) = Chain(), fast_peer()
    for i, folder in enumerate(folders):
        tensors, stage = read_cells(folder), read_manifest(folder).stage
        is_key = i % KEY_INTERVAL == 0
        coded = chain.encode(tensors, is_key)
        for tensor, cells in chain.decode(coded, is_key).items():
            assert np.array_equal(cells, tensors[tensor]), f"{folder.name}: {tensor} decodes to other cells"
        base, exact = sizes(coded)
        raw = sum(cells.nbytes for cells in tensors.values())
        totals = stages.setdefault("stable" if stage == "warmup" else stage, Totals())
        if is_key:
            totals.key_raw, totals.key_base = totals.key_raw + raw, totals.key_base + base
            totals.key_exact += exact
        else:
            totals.raw, totals.base, totals.exact = totals.raw + raw, totals.base + base, totals.exact + exact
            totals.ideal += sum(ideal_bytes(cells, chain.before[n]) for n, cells in tensors.items())
            data = joined(tensors)
            shares = {peer_name: len(peer(data)) / raw}
            if i % SAMPLED == 1:
                shares["zstd -19"] = len(zstandard.compress(data, 19)) / raw
                xored = np.frombuffer(data, np.uint16) ^ np.frombuffer(joined(chain.before), np.uint16)
                shares["xor+zstd"] = len(planes_zstd(xored.tobytes())) / raw
            for key, share in shares.items():
                totals.peers.setdefault(key, []).append(share)
            print(f"{name} {folder.name} {stage}: {exact / raw:.1%} exact, {base / raw:.1%} base", flush=True)
        if divergence is not None and i % SAMPLED == 1:
            divergence.add(folder, {n: c.reference.base for n, c in coded.items()})
        chain.go_on(tensors, coded)
    return {stage: totals for stage, totals in stages.items() if totals.raw}


def size_rows(stages: dict[str, Totals], suffix: str, has_bar: bool) -> Iterator[Row]:
    """Shares of raw bf16; bars hold for checkpoints 50 steps apart."""
    bars = {"stable": 1 / 0.85, "decay": 1 / 0.68} if has_bar else {}
    for stage, t in stages.items():
        # Key frames cost the same on both sides.
        ours, ideal = t.with_keys(t.exact, t.key_exact), t.with_keys(t.ideal, t.key_exact)
        print(
            f"{stage}{suffix}: exact {t.exact / t.raw:.2%} of raw, with key frames {ours:.2%}, "
            f"ideal {t.ideal / t.raw:.2%}; "
            f"base layer {t.base / t.raw:.2%}, {t.with_keys(t.base, t.key_base):.2%} with key frames"
        )
        # exact <= 1.04 ideal + key frames
        bound = t.with_keys(1.04 * t.ideal, t.key_exact)
        yield compare(
            f"exact-{stage}{suffix}", ours, bound, "1.04 ideal + keys", "of raw", 1.0 if has_bar else None,
            less_is_better=True,
        )  # fmt: skip
        yield compare(f"ideal-{stage}{suffix}", ours, ideal, "ideal + keys", "of raw", less_is_better=True)
        for peer, shares in t.peers.items():
            is_zipnn = peer in ("zipnn", "planes+zstd")
            must = bars.get(stage) if is_zipnn else None
            name = ("zipnn" if is_zipnn else peer.replace(" ", "")) + f"-{stage}{suffix}"
            yield compare(name, ours, float(np.mean(shares)), peer, "of raw", must, less_is_better=True)


def base_rows(stages: dict[str, Totals], divergence: Divergence) -> Iterator[Row]:
    raw = sum(t.raw + t.key_raw for t in stages.values())
    share = sum(t.base + t.key_base for t in stages.values()) / raw
    yield compare("base", share, 0.18, "bound", "of raw, with keys", 1.0, less_is_better=True)
    worst = max(divergence.values)
    yield compare("base-kl", worst, 0.01, "bound", "nats, the worst", 1.0, less_is_better=True)


def speed_rows(folders: list[Path], rounds: int) -> Iterator[Row]:
    first, second = (read_cells(folder) for folder in folders[-2:])
    chain, (peer_name, peer) = Chain(), fast_peer()
    chain.go_on(first, chain.encode(first, True))
    coded, data = chain.encode(second, False), joined(second)

    def timed(work: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            work()
            return len(data) / (time.perf_counter() - start) / 1e6

        return run

    contenders = {
        "encode": timed(lambda: chain.encode(second, False)),
        "decode": timed(lambda: chain.decode(coded, False)),
        peer_name: timed(lambda: peer(data)),
    }
    samples = take_turns(contenders, rounds)
    for name, bar in (("encode", 100.0), ("decode", 200.0)):
        yield compare(name, samples.median(name), bar, "bound", "MB/s", 1.0, disturbed=samples.disturbed)
    yield compare(
        f"encode-{peer_name}", samples.median("encode"), samples.median(peer_name), f"{peer_name}, one thread", "MB/s",
        disturbed=samples.disturbed,
    )  # fmt: skip


def walk_large(num_steps: int = 3) -> None:
    """Code and decode a random walk of the 2B shape, a part at a time as the history does; print the peak memory."""
    noise = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
    raw = coded_bytes = 0
    for shape in PRESETS["minicpm-2b"].weight_shapes().values():
        row = int(np.prod(shape[1:]))
        for start in range(0, shape[0], max(1, PART_BYTES // (2 * row))):
            part = (min(shape[0] - start, max(1, PART_BYTES // (2 * row))), *shape[1:])
            weights, reference = np.resize(noise, part) * np.float32(0.02), None
            for step in range(num_steps):
                weights = weights + np.resize(np.roll(noise, 977 * (step + 1)), part) * np.float32(0.02 * 0.33)
                cells = (weights.view(np.uint32) >> 16).astype(np.uint16)
                coded = encode(cells, reference)
                back, after = decode(coded.header, coded.base, coded.refinement, reference)
                assert np.array_equal(back, cells)
                reference = after
                raw, coded_bytes = raw + cells.nbytes, coded_bytes + sizes({"": coded})[1]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, raw, coded_bytes)


def large_rows() -> Iterator[Row]:
    done = subprocess.run([sys.executable, __file__, "--walk-large"], check=True, capture_output=True, text=True)
    peak, raw, coded = map(int, done.stdout.split())
    print(f"2B shape, {raw / 1e9:.1f} GB in all: {coded / raw:.1%} of raw")
    yield compare("memory", peak, LARGE_BOUND_BYTES, "bound", "bytes at the peak", 1.0, less_is_better=True)


def train(folder: Path, is_quick: bool) -> Path:
    """Train a small model; two minutes, or half of one."""
    steps = 120 if is_quick else 900
    settings = [
        "model.vocab_size=2048", "batch.sequences=[4]", f"schedule.total_steps={steps}", f"schedule.decay={steps // 3}",
        f"loop.save_every={10 if is_quick else 50}", "loop.eval_every=100000", "loop.sample_every=0",
    ]  # fmt: skip
    config = Path(__file__).parents[1] / "configs" / "nano.toml"
    command = [sys.executable, "-m", "minicpm", "pretrain", str(config), "--out", str(folder), *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, help="a run's folder with checkpoints (default: train one)")
    parser.add_argument("--large", action="store_true", help="also the memory of three steps of the 2B shape")
    parser.add_argument("--walk-large", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.walk_large:
        walk_large()
        return
    with tempfile.TemporaryDirectory() as temporary:
        run = options.run or train(Path(temporary) / "run", options.quick)
        folders = step_folders(run)
        divergence = Divergence(run)
        stages = measure(folders[:10] if options.quick and options.run else folders, divergence, run.name)
        rows = [*size_rows(stages, "", has_bar=True), *base_rows(stages, divergence)]
        if len(folders) >= 3 * THINNING:
            thinned = measure(folders[THINNING - 1 :: THINNING], None, "thinned")
            rows += size_rows(thinned, "-thinned", has_bar=False)
        rows += speed_rows(folders, rounds_of(options))
        if options.large:
            rows += large_rows()
    finish(rows, options)


if __name__ == "__main__":
    main()
