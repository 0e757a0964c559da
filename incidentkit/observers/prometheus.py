"""Record metrics with Prometheus."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from incidentkit.domain.errors import MissingDependency
from incidentkit.observing import CALLERS, CacheRead, Database, outcome

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise MissingDependency("prometheus-client", extra="metrics") from error

BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Upper bounds in seconds of durations of calls and statements, as OpenTelemetry advises."""

LAG_BUCKETS: Final = (0.1, 0.5, 1.0, 5.0, 30.0, 60.0, 300.0, 1800.0)
"""Upper bounds in seconds of the age of a delivered change, which is known in whole seconds."""

HTTP_BUCKETS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25),
    *(0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
"""Upper bounds in seconds of durations of requests, as OpenTelemetry advises."""

SHARED_BUCKETS: Final = (1, 2, 5, 10, 20, 50, 100, 200)
"""Upper bounds of the number of calls that share a statement."""

GAUGES: Final = {
    "cache_available": "Whether the shared cache works: 1 or 0.",
    "feed_blocker_age_seconds": (
        "Age of the transaction that holds the change feed up; 0 without one."
    ),
    "pool_connections": "Connections to the database that are in use or being opened.",
    "pool_maximum_connections": "Maximum number of connections to the database.",
    "pool_waiting_calls": "Calls that wait for a connection to the database.",
    "readers": "Streams and polls that wait for changes.",
}
"""The gauges that are read for each scrape, with their help."""

MULTIPROCESS: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The variable with the folder in which several processes add up their metrics."""


class PrometheusObserver:
    """Counts and times the calls of a client, as metrics for Prometheus.

    Each observer has a registry of its own. If ``PROMETHEUS_MULTIPROC_DIR`` was set when
    prometheus-client was imported, :meth:`expose` returns the sums of all processes that share that
    folder.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._calls = Counter(
            "incidentkit_calls", "Calls of the client.", ["verb", "outcome"], registry=registry
        )
        self._call_seconds = Histogram(
            "incidentkit_call_duration_seconds",
            "Duration of calls of the client.",
            ["verb"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._statement_seconds = Histogram(
            "incidentkit_statement_duration_seconds",
            "Duration of statements, which concurrent calls may share.",
            ["operation", "outcome"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._shared = Histogram(
            "incidentkit_calls_per_statement",
            "Number of calls that share a statement.",
            ["operation"],
            buckets=SHARED_BUCKETS,
            registry=registry,
        )
        self._pool_timeouts = Counter(
            "incidentkit_pool_timeouts",
            "Calls that have waited in vain for a connection to the database.",
            registry=registry,
        )
        self._cache_reads = Counter(
            "incidentkit_cache_reads",
            "Reads of pages of the list, by where the page came from.",
            ["result"],
            registry=registry,
        )
        self._lag = Histogram(
            "incidentkit_feed_lag_seconds",
            "Age of changes when they are delivered to a waiting reader.",
            buckets=LAG_BUCKETS,
            registry=registry,
        )
        self._request_seconds = Histogram(
            "http_server_request_duration_seconds",
            "Duration of HTTP requests until the answer is ready.",
            ["http_request_method", "http_route", "http_response_status_code"],
            buckets=HTTP_BUCKETS,
            registry=registry,
        )

    @contextmanager
    def call(self, verb: str, /) -> Iterator[object]:
        """Count and time a call."""
        started = time.perf_counter()
        result = "ok"
        try:
            yield object()
        except BaseException as error:
            result = type(error).__name__
            raise
        finally:
            self._calls.labels(verb, result).inc()
            self._call_seconds.labels(verb).observe(time.perf_counter() - started)

    @contextmanager
    def statement(self, operation: str, _database: Database, /) -> Iterator[None]:
        """Time a statement, and count the calls that share it."""
        callers = len(CALLERS.get())
        if callers:
            self._shared.labels(operation).observe(callers)
        started = time.perf_counter()
        result = "ok"
        try:
            yield
        except BaseException as error:
            result = outcome(error)
            raise
        finally:
            seconds = time.perf_counter() - started
            self._statement_seconds.labels(operation, result).observe(seconds)

    def pool_timeout(self) -> None:
        """Count a call that got no connection in time."""
        self._pool_timeouts.inc()

    def cache_read(self, result: CacheRead, /) -> None:
        """Count a read of a page of the list."""
        self._cache_reads.labels(result).inc()

    def delivered(self, seconds: float, /) -> None:
        """Record the age of a change that is delivered."""
        self._lag.observe(seconds)

    def request(self, method: str, route: str, status: int, seconds: float, /) -> None:
        """Record an answered request."""
        self._request_seconds.labels(method, route, str(status)).observe(seconds)

    def expose(self, present: Mapping[str, float]) -> bytes:
        """Return all metrics in Prometheus's text format.

        Args:
            present: The present values of :data:`GAUGES`; one that is missing is left out.
        """
        metrics = self.registry
        if MULTIPROCESS in os.environ:
            metrics = CollectorRegistry()
            collect: Callable[[CollectorRegistry], object] = MultiProcessCollector
            collect(metrics)
        now = CollectorRegistry()
        now.register(_Present(present))
        return generate_latest(metrics) + generate_latest(now)


class _Present(Collector):
    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = values

    def collect(self) -> Iterable[Metric]:
        for name, text in GAUGES.items():
            if name in self._values:
                yield GaugeMetricFamily(f"incidentkit_{name}", text, value=self._values[name])
