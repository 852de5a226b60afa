"""Our server against llama-server (of the package xllamacpp) on the default model, under the same load client.

Prompts of about 130 tokens, 64 tokens out, greedy, streamed, all arriving at once at concurrency 1, 4 and 16.
`serve-N` is output tokens per second with distinct prompts, `ttft-N` the median time to the first token; rows that end
in `-shared` have prompts with a common beginning of about 100 tokens, which no server has seen before the round.
Both servers run all the time and take turns; neither computes anything while the other is asked.

`--soak` instead asks ours 1,000 times at concurrency 64, with a fifth of the clients leaving at random moments, and
says what was left: blocks, errors, memory.
"""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.load import Answer, ask, ask_at_once
from bench.prompts import passages
from bench.rows import Row, arguments, compare, finish, rounds_of, take_turns

from minicpm.hub import DEFAULT_MODEL, resolve

# Concurrency -> what tokens per second, and the time to the first token, must reach against the peer.
MUSTS = {1: (2.5, 1 / 0.3), 4: (4.5, 1 / 0.2), 16: (6.0, 1 / 0.12)}
NUM_OUT, NUM_WORDS = 64, 96
PEER = "llama-server"
PEER_PROGRAM = """
import sys, threading
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], 0
params.n_parallel, params.n_ctx = 16, 16 * 512
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
params.verbosity = -1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()
"""


class Server(NamedTuple):
    """A server process."""

    pid: int
    port: int


@contextmanager
def serving(command: list[str]) -> Iterator[Server]:
    """Run a server, which says its address on a line of its own."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        said = ""
        while not (found := re.search(r"https?://[\w.]+:(\d+)", said)):
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{command[:3]} did not start: {said}")
            said += line
        yield Server(process.pid, int(found[1]))
    finally:
        process.terminate()
        process.wait(30)


def our_command(path: Path, threads: int) -> list[str]:
    """The command line of our server."""
    command = [sys.executable, "-m", "minicpm", "serve", str(path), "--port", "0", "--ctx", "512"]
    return [*command, "--threads", str(threads), "--kv-cache-tokens", str(64 * 512)]


class Load:
    """Requests of one kind for all rounds; no prompt comes twice."""

    def __init__(self, concurrency: int, is_shared: bool) -> None:
        self.concurrency, self.is_shared = concurrency, is_shared
        self.texts = [" ".join(text.split()[:NUM_WORDS]) for text in passages(64)]
        self.count = 0
        self.first: dict[str, list[float]] = {}

    def bodies(self) -> list[dict[str, Any]]:
        """The requests of the next round."""
        self.count += 1
        size = len(self.texts)
        prompts = []
        for i in range(self.concurrency):
            own = self.texts[(self.count * 16 + i) % size]
            if self.is_shared:
                head = " ".join(self.texts[self.count % size].split()[:75])
                prompts.append(f"Page {self.count}: {head}\n{i}: {' '.join(own.split()[:18])}")
            else:
                prompts.append(f"{self.count}.{i}: {own}")
        return [request(prompt) for prompt in prompts]

    def run(self, name: str, port: int) -> float:
        """Ask, note the median time to the first token, and return output tokens per second."""
        answers, seconds = ask_at_once(port, self.bodies())
        failed = [answer.status for answer in answers if answer.num_tokens != NUM_OUT]
        if failed:
            raise RuntimeError(f"{name}: {len(failed)} answers are not whole, with status {failed[0]}")
        self.first.setdefault(name, []).append(statistics.median(answer.first_seconds for answer in answers))
        return sum(answer.num_tokens for answer in answers) / seconds


def request(prompt: str, num_out: int = NUM_OUT) -> dict[str, Any]:
    """A request whose answer cannot end early: end tokens are made impossible."""
    return {
        "prompt": prompt,
        "max_tokens": num_out,
        "temperature": 0,
        "logit_bias": {"0": -100, "2": -100},
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def measure(options: Namespace, path: Path) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    peer = [sys.executable, "-c", PEER_PROGRAM, str(path), str(options.threads)]
    with serving(our_command(path, options.threads)) as ours, serving(peer) as theirs:
        servers = {"ours": ours, PEER: theirs}
        for server in servers.values():
            ask_at_once(server.port, [request("Warm up: one, two, three", 8)] * 2)
        for concurrency, (rate, first) in MUSTS.items():
            for is_shared in (False, True):
                load = Load(concurrency, is_shared)
                samples = take_turns(
                    {name: partial(load.run, name, server.port) for name, server in servers.items()},
                    rounds_of(options),
                    attempts=1 if options.quick else 2,
                    own=[server.pid for server in servers.values()],
                )
                kind = "-shared" if is_shared else ""
                label, disturbed = f"{concurrency}{kind}", samples.disturbed
                speeds = samples.median("ours"), samples.median(PEER)
                rows.append(compare(f"serve-{label}", *speeds, PEER, "tokens/s", rate, disturbed=disturbed))
                times = [statistics.median(load.first[name][-rounds_of(options) :]) for name in servers]
                rows.append(
                    compare(f"ttft-{label}", *times, PEER, "s", first, less_is_better=True, disturbed=disturbed)
                )
    return rows


def soak(path: Path, threads: int, count: int) -> None:
    """Ask `count` times at concurrency 64, a fifth of the clients leaving, and say what is left."""
    with serving(our_command(path, threads)) as (_, port):
        texts = [" ".join(text.split()[:NUM_WORDS]) for text in passages(64)]
        chance = random.Random(1)
        plans = [
            (f"{i}: {texts[i % len(texts)]}"[: chance.randrange(40, 800)], chance.random() * 2 if i % 5 == 0 else None)
            for i in range(count)
        ]

        async def run(part: list[tuple[str, float | None]]) -> list[Answer]:
            gate = asyncio.Semaphore(64)

            async def one(prompt: str, leave_after: float | None) -> Answer:
                async with gate:
                    return await ask(port, request(prompt, 16), leave_after=leave_after)

            return list(await asyncio.gather(*(one(*plan) for plan in part)))

        answers: list[Answer] = []
        sizes = []
        begin = time.perf_counter()
        for start in range(0, count, count // 5):
            answers += asyncio.run(run(plans[start : start + count // 5]))
            sizes.append(gauge(port, "process_resident_memory_bytes") / 2**20)
        seconds = time.perf_counter() - begin
        time.sleep(0.5)
        left = {name: gauge(port, f"minicpm_{name}") for name in ("kv_blocks_held", "requests_running")}
    statuses = {status: sum(answer.status == status for answer in answers) for status in {a.status for a in answers}}
    print(f"soak: {count} requests in {seconds:.1f} s; answers by status (0: the client left): {statuses}")
    print(f"left afterwards: {left}; resident MiB after each fifth: {[round(size) for size in sizes]}")


def gauge(port: int, name: str) -> float:
    """A number of /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found, name
    return float(found[1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a GGUF file (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each server (default: %(default)s)")
    parser.add_argument("--soak", action="store_true", help="1,000 requests, a fifth of whose clients leave")
    options = parser.parse_args()
    path = resolve(options.model)
    if options.soak:
        soak(path, options.threads, 200 if options.quick else 1000)
        return
    finish(measure(options, path), options)


if __name__ == "__main__":
    main()
