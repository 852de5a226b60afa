"""The engine against the limits of the machine and, with `--llama-bench PATH`, against llama.cpp on the same file.

Bare rows are shares of the machine (of its read bandwidth for decoding, of torch's bf16 matrix product for prefill) or
of the stated bound; rows named `-vs-llamacpp` are tokens per second against llama-bench (memory: bytes). Ours, the
machine and the peer take turns. `2b` is a random model of MiniCPM-2B's shape, made on the first run; `135m` is the
default model of the package. Speed counts only with truth: `kl-135m` is the divergence of the kernel that was timed
from exact arithmetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.random_model import RANDOM_NAME, write_random_model
from bench.rows import Row, Samples, arguments, compare, finish, rounds_of, take_turns
from tests.reference import ReferenceDecoder, divergence

from minicpm import _native
from minicpm.architecture import PRESETS
from minicpm.cli.llama_bench import LlamaBench
from minicpm.engine.decoder import Decoder, available_processors
from minicpm.engine.speed import Stopwatch, blocks_for, decode_bytes, prefill_operations, streamed_bytes
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.gguf_read import open_gguf
from minicpm.hub import DEFAULT_MODEL, resolve
from minicpm.tokenizer import Tokenizer

# Name -> what the bare ratio must reach, what the ratio to llama.cpp must reach; None is not asked for.
MUSTS: dict[str, tuple[float | None, float | None]] = {
    "prefill-2b": (0.75, 2.2),
    "decode-2b": (0.72, 1.2),
    "decode-2b-1024": (0.68, 1.5),
    "batch16-2b": (None, 2.0),
    "noamx-2b-decode": (None, 2.0),
    "noamx-2b-prefill": (None, 1.5),
    "memory-2b": (1.0, None),
    "first-token-2b": (1.0, None),
    "first-token-135m": (1.0, None),
    "prefill-135m": (None, 1.5),
    "decode-135m": (None, 1.15),
    "decode-135m-1024": (None, 1.6),
    "busy-135m": (0.85, None),
    "kl-135m": (1.0, None),
}
PROMPT, CONTEXT, BATCH = 512, 1024, 16
READ_BYTES, PRODUCT = 1 << 30, (512, 2304, 5760)
MEAN_KL, MEMORY_FACTOR = 5e-4, 1.1
FIRST_TOKEN_SECONDS = {"first-token-135m": 0.5, "first-token-2b": 1.2}
# After a prompt, in a process of its own: what a user's chat holds.
RESIDENT = """
import sys
from minicpm.engine.opening import open_language_model
model = open_language_model(sys.argv[1], context_length=1024, max_parallel=1, num_threads=int(sys.argv[2]))
model.next_logprobs([3 + i % 200 for i in range(int(sys.argv[3]))])
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS:")))
"""
SPIN = "import os\nos.sched_setaffinity(0, [max(os.sched_getaffinity(0))])\nwhile True: pass"


class Subject:
    """One file, our decoder on it, and the peer; `kernel` "" is the best one."""

    def __init__(self, name: str, path: Path, options: argparse.Namespace, kernel: str, program: str | None) -> None:
        self.name, self.path, self.kernel, self.threads = name, path, kernel, options.threads
        self.rounds, self.is_quick = rounds_of(options), options.quick
        self.steps = 4 if options.quick and name != "135m" else 32
        self.checkpoint = open_checkpoint(path)
        self.config = self.checkpoint.config
        self.weight_bytes = streamed_bytes(self.checkpoint.weights.entries)
        self.peer = LlamaBench(program, path, self.threads) if program else None
        self._num_filled = 0

    @cached_property
    def decoder(self) -> Decoder:
        """Ours, repacked when it is first wanted."""
        decoder = self.make_decoder(self.threads)
        print(f"{self.name}: {self.path.name}, kernel {decoder.kernel}, {self.threads} threads; {decoder.dtypes}")
        return decoder

    @cached_property
    def watch(self) -> Stopwatch:
        """The clock of `decoder`."""
        return Stopwatch(self.decoder)

    def make_decoder(self, threads: int) -> Decoder:
        """Another one, whose cache holds what is timed here."""
        num_blocks = max(blocks_for(CONTEXT + self.steps), blocks_for(self.steps, BATCH))
        weights = self.checkpoint.weights
        return Decoder(self.config, weights, num_threads=threads, num_blocks=num_blocks, kernel=self.kernel)

    def fill(self, context: int) -> None:
        """Have keys and values in the first `context` positions; what they are does not matter to the clock."""
        while self._num_filled < context:
            count = min(PROMPT, context - self._num_filled)
            self.watch.prefill(count, self._num_filled)
            self._num_filled += count

    def prefill(self) -> float:
        """Tokens per second of a prompt."""
        speed = PROMPT / self.watch.prefill(PROMPT)
        self._num_filled = max(self._num_filled, PROMPT)
        return speed

    def decode(self, context: int = 0, batch: int = 1) -> float:
        """Tokens per second of all sequences together."""
        return self.steps * batch / self.watch.decode(self.steps, context, batch)


def read_rate(threads: int) -> float:
    return _native.read_bandwidth(READ_BYTES, threads)


def product_rate(threads: int) -> float:
    """Operations per second of torch's bf16 product at a feed-forward layer's size."""
    import torch

    torch.set_num_threads(threads)
    rows, inner, columns = PRODUCT
    left, right = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        torch.nn.functional.linear(left, right)
        times.append(time.perf_counter() - begin)
    # The first one packs and plans.
    return float(2 * np.prod(PRODUCT) / min(times[1:]))


def versus(name: str, samples: Samples, peer: str = "llama.cpp") -> list[Row]:
    """The row against the peer, if it was measured."""
    if "peer" not in samples.values:
        return []
    ours, theirs = samples.median("ours"), samples.median("peer")
    must = MUSTS[name][1]
    return [compare(f"{name}-vs-llamacpp", ours, theirs, peer, "tokens/s", must, disturbed=samples.disturbed)]


def contend(
    subject: Subject, limit: Callable[[], float], ours: Callable[[], float], peer: Callable[[], float]
) -> Samples:
    contenders = {"limit": limit, "ours": ours} | ({"peer": peer} if subject.peer else {})
    return take_turns(contenders, subject.rounds, attempts=1 if subject.is_quick else 2)


def prefill(subject: Subject, name: str) -> list[Row]:
    subject.watch.prefill(32)
    samples = contend(
        subject,
        lambda: product_rate(subject.threads),
        subject.prefill,
        lambda: subject.peer.prefill(PROMPT),
    )
    rate = samples.median("ours") * prefill_operations(subject.config, 1)
    limit, must = samples.median("limit") / 1e12, MUSTS[name][0]
    bare = compare(name, rate / 1e12, limit, "torch bf16 product", "TOP/s", must, disturbed=samples.disturbed)
    return [bare, *versus(name, samples)]


def decode(subject: Subject, name: str, context: int = 0, batch: int = 1) -> list[Row]:
    subject.fill(context)
    subject.decode(context, batch)
    batched = subject.peer is not None and subject.peer.can_batch

    def peer() -> float:
        if batch == 1:
            return subject.peer.decode(subject.steps, context)
        # A prompt as long as the batch does the same matrix products, but one row of the head only.
        return subject.peer.decode_batch(subject.steps, batch) if batched else subject.peer.prefill(batch)

    samples = contend(subject, lambda: read_rate(subject.threads), lambda: subject.decode(context, batch), peer)
    middle = context + subject.steps / 2
    rate = samples.median("ours") / batch * decode_bytes(subject.weight_bytes, subject.config, middle, batch)
    limit, must = samples.median("limit") / 1e9, MUSTS[name][0]
    bare = compare(name, rate / 1e9, limit, "read bandwidth", "GB/s", must, disturbed=samples.disturbed)
    told = "llama.cpp" if batch == 1 or batched else f"llama.cpp, prompt of {batch}"
    return [bare, *versus(name, samples, told)]


def memory(subject: Subject, name: str) -> list[Row]:
    words = [sys.executable, "-c", RESIDENT, str(subject.path), str(subject.threads), str(PROMPT)]
    ours = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout) / 2**30
    bound = MEMORY_FACTOR * (subject.path.stat().st_size + subject.config.kv_cache_bytes(PROMPT)) / 2**30
    rows = [compare(name, ours, bound, "1.1 × (file + KV)", "GiB", MUSTS[name][0], less_is_better=True)]
    if subject.peer:
        theirs = subject.peer.resident_bytes(PROMPT) / 2**30
        rows.append(compare(f"{name}-vs-llamacpp", ours, theirs, "llama.cpp", "GiB", less_is_better=True))
    return rows


def first_token(subject: Subject, name: str) -> list[Row]:
    """Seconds from the start of `minicpm chat` to the first byte that it writes; the file was read just before."""
    words = [sys.executable, "-m", "minicpm", "chat", str(subject.path), "What is the capital of France?"]
    words += ["--max-tokens", "1", "--ctx", str(CONTEXT), "--threads", str(subject.threads)]

    def run() -> float:
        begin = time.perf_counter()
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            is_answered = bool(process.stdout.read(1))
            seconds = time.perf_counter() - begin
            process.stdout.read()
        if not is_answered or process.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {process.returncode} and no answer")
        return seconds

    run()
    samples = take_turns({"ours": run}, subject.rounds, attempts=1 if subject.is_quick else 2)
    bound, must = FIRST_TOKEN_SECONDS[name], MUSTS[name][0]
    ours = samples.median("ours")
    return [compare(name, ours, bound, "bound", "s", must, less_is_better=True, disturbed=samples.disturbed)]


def busy(subject: Subject, name: str) -> list[Row]:
    """While another process spins on one of the processors; the bound is our own speed on one thread, undisturbed."""
    alone = Stopwatch(subject.make_decoder(1))
    alone.decode(4)

    def crowded(run: Callable[[], float]) -> float:
        with subprocess.Popen([sys.executable, "-S", "-c", SPIN]) as spinner:
            time.sleep(0.2)
            try:
                return run()
            finally:
                spinner.kill()

    samples = contend(
        subject,
        lambda: subject.steps / alone.decode(subject.steps),
        lambda: crowded(subject.decode),
        lambda: crowded(lambda: subject.peer.decode(8)),
    )
    ours, limit, must = samples.median("ours"), samples.median("limit"), MUSTS[name][0]
    bare = compare(name, ours, limit, "ours, one thread", "tokens/s", must, disturbed=samples.disturbed)
    return [bare, *versus(name, samples)]


def faithfulness(subject: Subject, name: str, num_tokens: int = 200) -> list[Row]:
    """Mean KL of the next token to exact arithmetic, of a prompt or token by token, whichever is worse."""
    text = Tokenizer.from_gguf(subject.checkpoint.metadata).encode((np.__doc__ or "") * 4)
    ids, at = np.array(text[:num_tokens], np.int32), np.arange(num_tokens, dtype=np.int32)
    truth = ReferenceDecoder(subject.config, subject.checkpoint.weights, num_blocks=1).full_logits(ids)
    table, zeros = np.arange(blocks_for(num_tokens), dtype=np.int32)[None], np.zeros(num_tokens, np.int32)
    step = subject.decoder.step
    at_once = step(ids, at, zeros, table, at)
    singly = [step(ids[i : i + 1], at[i : i + 1], zeros[:1], table, zeros[:1])[0] for i in at]
    means = [np.mean([divergence(*pair) for pair in zip(truth, way, strict=True)]) for way in (at_once, singly)]
    told = f"prompt {means[0]:.1e}, token by token {means[1]:.1e}"
    print(f"{subject.name}: mean KL to exact arithmetic over {num_tokens} tokens: {told}")
    return [compare(name, float(max(means)), MEAN_KL, "bound", "nats", MUSTS[name][0], less_is_better=True)]


def random_2b(options: argparse.Namespace) -> Path:
    path: Path = options.folder / "minicpm-2b-q4_0.gguf"
    if not path.exists() or open_gguf(path).metadata.get("general.name") != RANDOM_NAME:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {path}")
        write_random_model(path, PRESETS["minicpm-2b"])
    return path


# The rows in order; those of one subject stand together, so that one decoder at a time is held.
JOBS: dict[str, tuple[str, Callable[[Subject, str], list[Row]]]] = {
    "memory-2b": ("2b", memory),
    "first-token-2b": ("2b", first_token),
    "prefill-2b": ("2b", prefill),
    "decode-2b": ("2b", decode),
    "decode-2b-1024": ("2b", lambda subject, name: decode(subject, name, CONTEXT)),
    "batch16-2b": ("2b", lambda subject, name: decode(subject, name, 0, BATCH)),
    "noamx-2b-decode": ("2b-noamx", decode),
    "noamx-2b-prefill": ("2b-noamx", prefill),
    "first-token-135m": ("135m", first_token),
    "prefill-135m": ("135m", prefill),
    "decode-135m": ("135m", decode),
    "decode-135m-1024": ("135m", lambda subject, name: decode(subject, name, CONTEXT)),
    "busy-135m": ("135m", busy),
    "kl-135m": ("135m", faithfulness),
}


# Where there is no AMX to switch off, these rows are others' once those were measured.
SAME_WITHOUT_AMX = {"noamx-2b-decode": "decode-2b", "noamx-2b-prefill": "prefill-2b"}


def renamed(rows: list[Row], name: str) -> list[Row]:
    """The rows of another job under this one's names and bars."""
    found = [row for row in rows if row.name.removesuffix("-vs-llamacpp") == SAME_WITHOUT_AMX[name]]
    bare, against = MUSTS[name]
    return [
        dataclasses.replace(row, name=name + "-vs-llamacpp", must=against)
        if row.name.endswith("-vs-llamacpp")
        else dataclasses.replace(row, name=name, must=bare)
        for row in found
    ]


def make_subject(name: str, options: argparse.Namespace) -> Subject:
    kernels = _native.features()["kernels"]
    if name != "2b-noamx":
        path = random_2b(options) if name == "2b" else resolve(DEFAULT_MODEL)
        return Subject(name, path, options, kernels[0], options.llama_bench)
    program = options.llama_bench_noamx or (None if "amx" in kernels[0] else options.llama_bench)
    kernel = next(kernel for kernel in kernels if "amx" not in kernel)
    return Subject(name, random_2b(options), options, kernel, program)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--llama-bench", metavar="PATH", help="llama.cpp's llama-bench; llama-batched-bench beside it")
    parser.add_argument("--llama-bench-noamx", metavar="PATH", help="one built without AMX, for the noamx rows")
    parser.add_argument("--only", metavar="NAME,…", help=f"these rows: {', '.join(JOBS)}")
    parser.add_argument("--threads", type=int, default=available_processors())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "minicpm-bench",
                        help="where the random model is kept (1.5 GB)")  # fmt: skip
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [*JOBS]
    unknown = set(names) - JOBS.keys()
    if unknown:
        parser.error(f"--only knows no {', '.join(sorted(unknown))}; rows are {', '.join(JOBS)}")
    has_amx = "amx" in _native.features()["kernels"][0]
    if not has_amx:
        print("no AMX here: the noamx rows are those of the best kernel and of the same llama-bench")
    rows: list[Row] = []
    subject = None
    for name, (subject_name, job) in JOBS.items():
        if name not in names:
            continue
        if not has_amx and SAME_WITHOUT_AMX.get(name) in names:
            rows += renamed(rows, name)
            continue
        if subject is None or subject.name != subject_name:
            subject = None  # frees the decoder before another comes
            subject = make_subject(subject_name, options)
        rows += job(subject, name)
    finish(rows, options)


if __name__ == "__main__":
    main()
