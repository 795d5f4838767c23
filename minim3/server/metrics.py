"""Figures for Prometheus at `/metrics`, in a registry of their own so that two servers in a process do not mix.

Counters and histograms are fed as things happen; what the engine holds (queue, pages, cache hits, acceptance) is read
from it when somebody asks. These reads take no lock: they are single integers, and a figure may be one step old.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import Scope

if TYPE_CHECKING:
    from minim3.server.driver import EngineDriver

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "minim3_http_requests", "HTTP requests answered.", ["route", "method", "status"], registry=self.registry
        )
        self._errors = Counter(
            "minim3_errors", "Requests that ended with an error, also in a stream, by status.", ["status"],
            registry=self.registry,
        )  # fmt: skip
        self._step_failures = Counter("minim3_step_failures", "Engine steps that failed.", registry=self.registry)
        self._disconnects = Counter(
            "minim3_disconnects", "Answers cut short because the client left.", registry=self.registry
        )
        self._prompt_tokens = Counter("minim3_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self._cached_tokens = Counter(
            "minim3_cached_prompt_tokens", "Tokens of prompts found in the prefix cache.", registry=self.registry
        )
        self._completion_tokens = Counter("minim3_completion_tokens", "Tokens generated.", registry=self.registry)
        self._finished = Counter("minim3_answers", "Answers by finish reason.", ["reason"], registry=self.registry)
        self._first_token = Histogram(
            "minim3_time_to_first_token_seconds", "From submission to an answer's first token.",
            buckets=_FIRST_TOKEN, registry=self.registry,
        )  # fmt: skip
        self._next_token = Histogram(
            "minim3_inter_token_seconds", "Between two tokens of an answer.",
            buckets=_NEXT_TOKEN, registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "minim3_request_seconds", "From arrival to the end of all answers of a request.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip

    def watch(self, driver: "EngineDriver") -> None:
        """Show what this driver's engine holds, too."""
        self.registry.register(_EngineCollector(driver))

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)
        self._completion_tokens.inc()

    def next_token(self, seconds: float) -> None:
        self._next_token.observe(seconds)
        self._completion_tokens.inc()

    def prompt(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)

    def answered(self, reason: str) -> None:
        self._finished.labels(reason).inc()

    def cached(self, num_tokens: int) -> None:
        self._cached_tokens.inc(num_tokens)

    def stream_failed(self, status: int) -> None:
        self._errors.labels(str(status)).inc()

    def generation_ended(self, seconds: float) -> None:
        self._seconds.observe(seconds)

    def step_failed(self) -> None:
        self._step_failures.inc()

    def disconnected(self) -> None:
        self._disconnects.inc()

    def request_ended(self, scope: Scope, status: int) -> None:
        # The route's pattern, not the path: what clients make up must not become label values.
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        self._requests.labels(route, method, str(status or "none")).inc()
        if status >= 400:
            self._errors.labels(str(status)).inc()


class _EngineCollector:
    def __init__(self, driver: "EngineDriver") -> None:
        self._driver = driver

    def collect(self) -> Iterator[Metric]:
        engine = self._driver.engine
        pool, stats = engine.cache.pool, engine.stats
        gauges = {
            "minim3_requests_active": ("Requests being prepared, waiting or running.", self._driver.num_active),
            "minim3_requests_waiting": ("Requests waiting in the engine's queue.", len(engine.scheduler.waiting)),
            "minim3_requests_running": ("Requests running in the engine.", len(engine.scheduler.running)),
            "minim3_pages_total": ("Pages of the cache.", pool.num_pages),
            "minim3_pages_free": ("Pages that a new request could take.", pool.num_free_pages),
            "minim3_pages_cached": ("Free pages that still hold a known prefix.", pool.num_cached_pages),
            "minim3_ready": ("1 while new requests are taken.", int(self._driver.ready)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        counters = {
            "minim3_engine_steps": ("Steps of the engine.", stats.num_steps),
            "minim3_drafted_tokens": ("Tokens that MTP modules proposed.", stats.num_drafted_tokens),
            "minim3_accepted_tokens": ("Proposed tokens that stood.", stats.num_accepted_tokens),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value)
