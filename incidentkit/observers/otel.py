"""Record spans and metrics with OpenTelemetry."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Final

from incidentkit.domain.errors import MissingDependency
from incidentkit.observing import CALLERS, CacheRead, Database, outcome, sqlstate
from incidentkit.version import __version__

try:
    from opentelemetry import metrics, trace
    from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode
except ModuleNotFoundError as error:
    raise MissingDependency("opentelemetry-api", extra="otel") from error

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

SCOPE: Final = "incidentkit"
"""The name of the instrumentation."""


class OpenTelemetryObserver:
    """Records a span and a duration for each call and each statement.

    A span of a call is named ``incidentkit create``. A span of a statement follows the semantic
    conventions for databases, without its text. It is inside the span of its call; if several calls
    may share the statement, it has links to theirs instead. The description of an error is never
    recorded.

    Args:
        tracer_provider: Makes the spans; None: the global one.
        meter_provider: Takes the measurements; None: the global one.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer(SCOPE, __version__, tracer_provider)
        meter = metrics.get_meter(SCOPE, __version__, meter_provider)
        self._calls = meter.create_histogram(
            "incidentkit.call.duration", "s", "Duration of calls of the client."
        )
        self._statements = meter.create_histogram(
            "db.client.operation.duration", "s", "Duration of database client operations."
        )
        self._shared = meter.create_histogram(
            "incidentkit.statement.calls", "{call}", "Number of calls that share a statement."
        )
        self._cache_reads = meter.create_counter(
            "incidentkit.cache.reads", "{read}", "Reads of pages of the list."
        )
        self._pool_timeouts = meter.create_counter(
            "db.client.connection.timeouts",
            "{timeout}",
            "Calls that waited in vain for a connection.",
        )
        self._lag = meter.create_histogram(
            "incidentkit.feed.lag", "s", "Age of changes when they are delivered."
        )

    @contextmanager
    def call(self, verb: str, /) -> Iterator[SpanContext]:
        """Start a span for a call, and return its context."""
        started = time.perf_counter()
        attributes: dict[str, str] = {"incidentkit.verb": verb}
        with self._span(f"incidentkit {verb}", SpanKind.INTERNAL, attributes) as span:
            try:
                yield span.get_span_context()
            except BaseException as error:
                attributes["error.type"] = type(error).__name__
                _fail(span, {"error.type": attributes["error.type"]})
                raise
            finally:
                self._calls.record(time.perf_counter() - started, attributes)

    @contextmanager
    def statement(self, operation: str, database: Database, /) -> Iterator[None]:
        """Start a span for a statement."""
        started = time.perf_counter()
        attributes = {"db.operation.name": operation, **_attributes(database)}
        callers = CALLERS.get()
        if callers:
            self._shared.record(len(callers), {"db.operation.name": operation})
        inside = trace.get_current_span().get_span_context().is_valid
        links = [] if inside else [Link(each) for each in callers if isinstance(each, SpanContext)]
        with self._span(operation, SpanKind.CLIENT, attributes, links) as span:
            try:
                yield
            except BaseException as error:
                failure = {"error.type": outcome(error)}
                state = sqlstate(error)
                if state is not None:
                    failure["db.response.status_code"] = state
                attributes |= failure
                _fail(span, failure)
                raise
            finally:
                self._statements.record(time.perf_counter() - started, attributes)

    @contextmanager
    def _span(
        self,
        name: str,
        kind: SpanKind,
        attributes: Mapping[str, str | int],
        links: Sequence[Link] = (),
    ) -> Iterator[Span]:
        # The text of an exception may contain values of an incident.
        with self._tracer.start_as_current_span(
            name,
            kind=kind,
            attributes=attributes,
            links=links,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span

    def pool_timeout(self) -> None:
        """Count a call that got no connection in time."""
        self._pool_timeouts.add(1)

    def cache_read(self, result: CacheRead, /) -> None:
        """Count a read of a page of the list."""
        self._cache_reads.add(1, {"incidentkit.cache.result": result})

    def delivered(self, seconds: float, /) -> None:
        """Record the age of a change that is delivered."""
        self._lag.record(seconds)

    def request(self, _method: str, _route: str, _status: int, _seconds: float, /) -> None:
        """Do nothing: the instrumentation of the host's web framework makes these spans."""


@cache
def _attributes(database: Database) -> Mapping[str, str | int]:
    """Return the attributes of a database, by the semantic conventions."""
    given = {
        "db.system.name": database.system,
        "db.namespace": database.name,
        "server.address": database.address,
        "server.port": database.port,
    }
    return {name: value for name, value in given.items() if value is not None}


def _fail(span: Span, attributes: dict[str, str]) -> None:
    span.set_attributes(attributes)
    span.set_status(Status(StatusCode.ERROR))
