"""What /metrics tells, in Prometheus' text format, and what it says about when to come again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from minicpm.engine import Load, QueueFullError, Sequence
from minicpm.errors import MiniCPMError

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
# Field of `Load` -> name, help, whether it only grows.
_LOAD = {
    "num_running": ("requests_running", "sequences that run", False),
    "num_waiting": ("requests_waiting", "sequences that wait", False),
    "num_waiting_tokens": ("tokens_waiting", "tokens of sequences that wait", False),
    "num_blocks": ("kv_blocks", "blocks of the KV cache", False),
    "num_held_blocks": ("kv_blocks_held", "blocks that sequences hold", False),
    "num_kept_blocks": ("kv_blocks_kept", "blocks that nobody holds but hold a prefix", False),
    "num_steps": ("engine_steps", "steps of the engine", True),
    "num_computed_tokens": ("computed_tokens", "rows that steps computed", True),
    "num_preemptions": ("preemptions", "sequences that had to make room", True),
    "num_drafted_tokens": ("drafted_tokens", "tokens that were guessed", True),
    "num_accepted_tokens": ("accepted_tokens", "guessed tokens that came true", True),
}


class _LoadCollector:
    """Asks the engine at each scrape."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        for field, (name, text, grows) in _LOAD.items():
            kind = CounterMetricFamily if grows else GaugeMetricFamily
            yield kind(f"minicpm_{name}", text, value=getattr(load, field))


class Metrics:
    """The counters of one server."""

    def __init__(self, load: Callable[[], Load], model_name: str) -> None:
        """Start at zero."""
        self._load = load
        self._registry = registry = CollectorRegistry()
        registry.register(_LoadCollector(load))
        # Registers itself: memory, processor seconds and open files of this process.
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "minicpm_http_requests", "answers by route and status", ["route", "status"], registry=registry
        )
        self.disconnects = Counter("minicpm_disconnects", "clients that left before their answer", registry=registry)
        self._refusals = Counter("minicpm_queue_refusals", "requests refused for a full queue", registry=registry)
        self._prompt_tokens = Counter("minicpm_prompt_tokens", "tokens of prompts", registry=registry)
        self._cached_tokens = Counter("minicpm_prompt_tokens_cached", "of them from the cache", registry=registry)
        self._new_tokens = Counter("minicpm_generated_tokens", "tokens of replies", registry=registry)
        self._finished = Counter("minicpm_finished", "sequences by how they ended", ["reason"], registry=registry)
        self._queued = Histogram("minicpm_queue_seconds", "until the first step", buckets=_SECONDS, registry=registry)
        self._first = Histogram(
            "minicpm_time_to_first_token_seconds", "until the first token", buckets=_SECONDS, registry=registry
        )
        self._each = Histogram(
            "minicpm_time_per_token_seconds", "between tokens", buckets=_TOKEN_SECONDS, registry=registry
        )
        self._whole = Histogram("minicpm_request_seconds", "until the end", buckets=_SECONDS, registry=registry)
        # When sequences ended, for the pace of the queue.
        self._ends: deque[float] = deque(maxlen=64)
        self.model_name = model_name

    def count_answer(self, route: str, status: int) -> None:
        """Note an HTTP answer."""
        self._requests.labels(route, str(status)).inc()

    def count_refusal(self, error: MiniCPMError) -> None:
        """Note a request that the engine did not take."""
        if isinstance(error, QueueFullError):
            self._refusals.inc()

    def count_sequence(self, sequence: Sequence) -> None:
        """Note a sequence that ended."""
        timings, num_new = sequence.timings, len(sequence.new_ids)
        self._ends.append(time.monotonic())
        self._finished.labels(sequence.finish_reason or "failed").inc()
        self._prompt_tokens.inc(sequence.num_prompt_tokens)
        self._cached_tokens.inc(sequence.num_cached_tokens)
        self._new_tokens.inc(num_new)
        if timings.started is not None:
            self._queued.observe(timings.started - timings.arrived)
        if timings.first_token is not None:
            self._first.observe(timings.first_token - timings.arrived)
        if timings.finished is not None:
            self._whole.observe(timings.finished - timings.arrived)
            if timings.first_token is not None and num_new > 1:
                self._each.observe((timings.finished - timings.first_token) / (num_new - 1))

    def retry_seconds(self) -> int:
        """Return after how many seconds, 1 to 60, half of what waits should be done, at the pace of the last minute."""
        now = time.monotonic()
        recent = [end for end in self._ends if now - end < 60]
        if len(recent) < 2:
            return 1
        rate = len(recent) / max(now - recent[0], 0.1)
        return max(1, min(60, round(self._load().num_waiting / 2 / rate)))

    def render(self) -> bytes:
        """Return the text of /metrics."""
        return generate_latest(self._registry)
