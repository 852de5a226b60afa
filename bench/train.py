"""Training speed and memory against HF Trainer and against a compiled plain loop, taking turns step by step.

Every contender is a process of its own that waits while the others run. `compiled` and ours have the same allocator
settings; HF Trainer runs as it comes. MFU is of the rate of a plain bf16 product of 8192 × 512 × 512, measured here.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from contenders.training import LENGTH, SHAPES, VOCABULARY
from rows import CALM_SHARE, ForeignLoad, Row, arguments, compare, finish, rounds_of, wait_for_calm

from minicpm.architecture import ModelConfig
from minicpm.train.allocator import TUNABLES, VARIABLE
from minicpm.train.flops import flops_per_token, measure_peak

CONTENDERS = ("ours", "trainer", "compiled")
# From the issue: speed over HF Trainer, over the compiled loop; MFU; HF Trainer's memory over ours.
MUST = {"trainer": 1.9, "compile": 1.15, "mfu": 0.28, "memory": 1 / 0.6}


@dataclass
class Worker:
    """A contender's process."""

    name: str
    process: subprocess.Popen[str]
    rates: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def run(self, steps: int) -> float:
        """Make steps and return the seconds that they took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        # What a library prints on its own is not the answer.
        while line and not line.startswith("{"):
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        found = json.loads(line)
        self.peak_bytes = found["peak_bytes"]
        return float(found["seconds"])

    def cpu_seconds(self) -> float:
        """Processor time that the process has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(contender: str, shape: str, rows: int) -> Worker:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    environment.pop(VARIABLE, None)
    if contender != "trainer":
        environment[VARIABLE] = TUNABLES
    command = [sys.executable, str(Path(__file__).parent / "contenders" / "training.py"), contender, shape, str(rows)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    return Worker(contender, process)


def measure(shape: str, rows: int, rounds: int, steps: int) -> tuple[list[Worker], bool]:
    workers = [start(contender, shape, rows) for contender in CONTENDERS]
    try:
        for worker in workers:
            # Compiling, and the first steps of a process.
            worker.run(3)
        wait_for_calm()
        load, before, began = ForeignLoad(), sum(w.cpu_seconds() for w in workers), time.perf_counter()
        for _ in range(rounds):
            for worker in workers:
                worker.rates.append(rows * LENGTH * steps / worker.run(steps))
        own = (sum(w.cpu_seconds() for w in workers) - before) / (time.perf_counter() - began) / (os.cpu_count() or 1)
        return workers, load.share() - own > CALM_SHARE
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


def rows_of(shape: str, rows: int, rounds: int, steps: int) -> list[Row]:
    workers, disturbed = measure(shape, rows, rounds, steps)
    hidden, inner, layers, heads = SHAPES[shape]
    model = ModelConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    torch.set_num_threads(2)
    peak = measure_peak(torch.bfloat16, torch.device("cpu"), rounds=30)
    ours, trainer, compiled = (statistics.median(worker.rates) for worker in workers)
    print(
        f"{shape}: {model.num_parameters().total:,} parameters, {rows} rows of {LENGTH}, GEMM {peak / 1e12:.3f} TFLOP/s"
    )
    flops = ours * flops_per_token(model, LENGTH)
    is_large = shape == "40m"
    memory = [worker.peak_bytes / 2**30 for worker in workers]
    speed = {"unit": "tokens/s", "disturbed": disturbed}
    only_large = {name: MUST[name] if is_large else None for name in ("mfu", "memory")}
    return [
        compare(f"trainer-{shape}", ours, trainer, "HF Trainer", must=MUST["trainer"], **speed),
        compare(f"compile-{shape}", ours, compiled, "HF + torch.compile", must=MUST["compile"], **speed),
        compare(f"mfu-{shape}", flops / 1e12, peak / 1e12, "GEMM peak", "TFLOP/s", only_large["mfu"]),
        compare(
            f"memory-{shape}", memory[0], memory[1], "HF Trainer", "GiB", only_large["memory"], less_is_better=True
        ),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=0, help="rows of a batch (default: 16; 4 with --quick)")
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="(default: both; 12m with --quick)")
    options = parser.parse_args()
    rows = options.rows or (4 if options.quick else 16)
    found: list[Row] = []
    for shape in options.shape or (["12m"] if options.quick else list(SHAPES)):
        found += rows_of(shape, rows, rounds_of(options), 1)
    finish(found, options)


if __name__ == "__main__":
    main()
