"""What the service counts: for Prometheus at /metrics, and as plain numbers for the status page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

WINDOW_S = 5.0
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """One service's counts.

    Args:
        bytes_by_part: weights' bytes of each part of the model.
    """

    def __init__(self, bytes_by_part: Mapping[str, int] | None = None):
        self.registry = CollectorRegistry()
        self._process = psutil.Process()
        self._recent: deque[tuple[float, int]] = deque()
        self.started = time.time()
        common = {"registry": self.registry, "namespace": "labkit"}
        self._requests = Counter("requests", "Requests answered", ["path", "status"], **common)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts, of pictures and sound too", **common)
        self._generated = Counter("generated_tokens", "Tokens generated", **common)
        self._abandoned = Counter("abandoned_requests", "Requests whose client went away", **common)
        self._ttft = Histogram(
            "time_to_first_token_seconds", "From the request to its first token", buckets=_SECONDS, **common
        )
        self._whole = Histogram("request_seconds", "From the request to its end", buckets=_SECONDS, **common)
        self._step = Histogram("step_seconds", "One step of the engine", buckets=_STEPS, **common)
        self._gauges = common
        memory = Gauge("memory_bytes", "Memory by part; process is all of it", ["part"], **common)
        for part, size in (bytes_by_part or {}).items():
            memory.labels(part).set(size)
        memory.labels("process").set_function(lambda: self._process.memory_info().rss)
        self._memory = memory

    def watch(
        self, running: Callable[[], int], waiting: Callable[[], int], cache_bytes: Callable[[], int]
    ) -> None:
        """Where the numbers of the moment come from."""
        for name, description, source in (
            ("running_answers", "Answers being generated", running),
            ("waiting_answers", "Answers waiting for their turn", waiting),
        ):
            Gauge(name, description, **self._gauges).set_function(source)
        Gauge("tokens_per_second", f"Over the last {WINDOW_S:g} s", **self._gauges).set_function(
            lambda: self.tokens_per_s
        )
        self._memory.labels("kv_cache").set_function(cache_bytes)

    def stepped(self, tokens: int, seconds: float) -> None:
        """The engine made a step; from its thread."""
        self._generated.inc(tokens)
        self._step.observe(seconds)
        self._recent.append((time.monotonic(), tokens))
        while self._recent and self._recent[0][0] < time.monotonic() - WINDOW_S:
            self._recent.popleft()

    def first_token(self, seconds: float) -> None:
        """A request has its first token."""
        self._ttft.observe(seconds)

    def finished(self, prompt_tokens: int, seconds: float) -> None:
        """A request has its whole answer."""
        self._prompt.inc(prompt_tokens)
        self._whole.observe(seconds)

    def answered(self, path: str, status: int) -> None:
        """A response was sent; ``path`` is one of the service's own, not what a client may make up."""
        self._requests.labels(path, str(status)).inc()

    def abandoned(self) -> None:
        """A client went away before its answer was whole."""
        self._abandoned.inc()

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all answers together, over the last `WINDOW_S` seconds."""
        since = time.monotonic() - WINDOW_S
        return sum(tokens for moment, tokens in list(self._recent) if moment >= since) / WINDOW_S

    def text(self) -> bytes:
        """Everything in Prometheus' format."""
        return generate_latest(self.registry)

    def facts(self) -> dict[str, float]:
        """What the status page shows."""
        value = self.registry.get_sample_value
        first = value("labkit_time_to_first_token_seconds_count") or 0
        return {
            "up_s": time.time() - self.started,
            "tokens_per_s": self.tokens_per_s,
            "generated_tokens": value("labkit_generated_tokens_total") or 0,
            "prompt_tokens": value("labkit_prompt_tokens_total") or 0,
            "answers": value("labkit_request_seconds_count") or 0,
            "ttft_s": (value("labkit_time_to_first_token_seconds_sum") or 0) / first if first else None,
            "process_bytes": self._process.memory_info().rss,
        }
