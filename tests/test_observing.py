"""An observer receives the calls of a client, and never the values of incidents."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.parser import text_string_to_metric_families

from incidentkit import (
    IncidentClient,
    IncidentKitError,
    IncidentNotFound,
    InvalidSettings,
    StoreUnavailable,
    acting_as,
)
from incidentkit.http import create_app
from incidentkit.http.authentication import TokenAuth
from incidentkit.observers.otel import OpenTelemetryObserver
from incidentkit.observers.prometheus import GAUGES, PrometheusObserver
from incidentkit.observing import Database, PoolUse
from incidentkit.settings import Settings
from incidentkit.store import StoreOptions
from incidentkit.store.observed import database_at
from tests.programs import service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.applications import Starlette

ROOT = Path(__file__).resolve().parent.parent
MEMORY = "sqlite+aiosqlite:///:memory:"


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the values in Prometheus's text format by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    """Return the value of one sample, 0 if it is missing."""
    return samples(text).get((name, frozenset(labels.items())), 0.0)


def ask(app: Starlette) -> httpx2.AsyncClient:
    """Return a client for an app whose lifespan is not run."""
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")


async def exercise(url: str) -> str:
    """Make a call of most kinds, and return what `/metrics` answers."""
    client = IncidentClient.open(url, observer=PrometheusObserver())
    async with client, ask(create_app(client, metrics=True)) as api:
        await client.create("Disk is full", source="monitoring")
        await client.list()
        await client.list()
        with pytest.raises(IncidentNotFound):
            await client.get(99)
        await api.get("/incident/get/1")
        await api.get("/nowhere")
        after = (await client.read_changes()).next
        text = ""
        while not value(text, "incidentkit_feed_lag_seconds_count"):
            # A note that comes before the reader waits is delivered, and does not count.
            waiting = asyncio.create_task(client.read_changes(after, wait=30))
            await asyncio.sleep(0.02)
            await client.note(1, "Still full")
            after = (await waiting).next
            text = (await api.get("/metrics")).text
        return text


async def test_metrics_count_and_time_what_happens(url: str) -> None:
    """Calls by outcome, statements, the cache, the feed and requests are all in `/metrics`."""
    text = await exercise(url)
    assert value(text, "incidentkit_calls_total", verb="create", outcome="ok") == 1
    assert value(text, "incidentkit_calls_total", verb="get", outcome="IncidentNotFound") == 1
    assert value(text, "incidentkit_call_duration_seconds_count", verb="list") == 2
    statements = "incidentkit_statement_duration_seconds_count"
    assert value(text, statements, operation="SELECT", outcome="ok") > 0
    assert value(text, "incidentkit_cache_reads_total", result="missing") == 1
    assert value(text, "incidentkit_cache_reads_total", result="process") == 1
    assert value(text, "incidentkit_feed_lag_seconds_count") == 1
    assert samples(text)["incidentkit_feed_blocker_age_seconds", frozenset()] == 0
    requests = "http_server_request_duration_seconds_count"
    found = {"http_request_method": "GET", "http_route": "/incident/get/{incident_id}"}
    assert value(text, requests, http_response_status_code="200", **found) == 1
    lost = {"http_request_method": "GET", "http_route": "(none)"}
    assert value(text, requests, http_response_status_code="404", **lost) == 1


async def test_metrics_are_served_only_on_request() -> None:
    """An app has no `/metrics` by default, and cannot have it for a client without metrics."""
    client = IncidentClient.open(MEMORY)
    async with client, ask(create_app(client)) as api:
        assert (await api.get("/metrics")).status_code == 404
    with pytest.raises(InvalidSettings, match="PrometheusObserver"):
        create_app(client, metrics=True)


async def test_metrics_need_a_token_that_may_read(migrated_sqlite_url: str) -> None:
    """With authentication, `/metrics` needs a token with the scope `read`."""
    client = IncidentClient.open(migrated_sqlite_url, observer=PrometheusObserver())
    app = create_app(client, metrics=True, authenticate=TokenAuth(client))
    async with client, ask(app) as api:
        assert (await api.get("/metrics")).status_code == 401
        for scope, status in (("report", 403), ("write", 403), ("admin", 403), ("read", 200)):
            secret = (await client.tokens.create(scope, scope)).secret
            headers = {"Authorization": f"Bearer {secret}"}
            assert (await api.get("/metrics", headers=headers)).status_code == status


async def test_an_out_of_date_page_and_a_failed_cache_are_told_apart(url: str) -> None:
    """A page that another client has made stale counts as such; a shared cache has a gauge."""
    observer = PrometheusObserver()
    client = IncidentClient.open(url, observer=observer)
    async with client, IncidentClient.open(url) as other:
        await client.list()
        await other.create("Disk is full", source="monitoring")
        await client.list()
        text = observer.expose({"cache_available": 0.0}).decode()
    assert value(text, "incidentkit_cache_reads_total", result="stale") == 1
    assert value(text, "incidentkit_cache_reads_total", result="missing") == 2
    assert samples(text)["incidentkit_cache_available", frozenset()] == 0


async def test_a_joined_transaction_is_observed(migrated_postgres_url: str) -> None:
    """Calls in the application's own transaction count like others."""
    import asyncpg

    observer = PrometheusObserver()
    connection = await asyncpg.connect(migrated_postgres_url)
    try:
        async with (
            IncidentClient.open(migrated_postgres_url, observer=observer) as client,
            connection.transaction(),
        ):
            await client.join(connection).create("Disk is full", source="monitoring")
    finally:
        await connection.close()
    text = observer.expose({}).decode()
    assert value(text, "incidentkit_calls_total", verb="create", outcome="ok") == 1


def test_a_client_without_an_observer_is_as_it_was() -> None:
    """Without an observer, the verbs are the plain methods of the class."""
    client = IncidentClient.open(MEMORY)
    assert client.observer is None
    assert "create" not in vars(client)


class Traces:
    """An observer for OpenTelemetry with what it exports."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.observer = OpenTelemetryObserver(tracers, MeterProvider([self.reader]))

    def spans(self) -> list[Any]:
        """Return the finished spans."""
        return list(self.exporter.get_finished_spans())

    def points(self) -> Iterator[tuple[str, Any]]:
        """Yield the name of each metric with each of its points."""
        data = self.reader.get_metrics_data()
        assert data is not None
        for resource in data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        yield metric.name, point


async def test_each_call_and_each_statement_has_a_span(url: str) -> None:
    """A call is an internal span by its verb, a statement a client span by the conventions."""
    traces = Traces()
    async with IncidentClient.open(url, observer=traces.observer) as client:
        traces.exporter.clear()
        await client.create("Disk is full", source="monitoring")
        with pytest.raises(IncidentNotFound):
            await client.get(99)
    spans = traces.spans()
    calls = {span.name: span for span in spans if span.kind is SpanKind.INTERNAL}
    assert set(calls) == {"incidentkit create", "incidentkit get"}
    assert calls["incidentkit create"].status.status_code is StatusCode.UNSET
    failed = calls["incidentkit get"]
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.attributes["error.type"] == "IncidentNotFound"
    statements = [span for span in spans if span.kind is SpanKind.CLIENT]
    assert statements
    system = "postgresql" if url.startswith("postgresql") else "sqlite"
    for span in statements:
        assert span.attributes["db.system.name"] == system
        assert span.name == span.attributes["db.operation.name"]
    names = {name for name, _ in traces.points()}
    assert names == {
        "db.client.operation.duration",
        "incidentkit.call.duration",
        "incidentkit.statement.calls",
    }


async def test_a_shared_statement_has_links_to_its_calls(migrated_postgres_url: str) -> None:
    """Calls that share a statement are linked from its span; one alone on SQLite is its parent."""
    traces, metrics = Traces(), PrometheusObserver()
    for observer in (traces.observer, metrics):
        async with IncidentClient.open(migrated_postgres_url, observer=observer) as client:
            await client.create("Disk is full", source="monitoring")
            traces.exporter.clear()
            await asyncio.gather(*(client.get(1) for _ in range(20)))
            await asyncio.gather(*(client.list() for _ in range(20)))
        if observer is metrics:
            break
        spans = traces.spans()
        calls = {span.context.span_id for span in spans if span.kind is SpanKind.INTERNAL}
        statements = [span for span in spans if span.kind is SpanKind.CLIENT]
        linked = [link.context.span_id for span in statements for link in span.links]
        assert len(statements) < 20
        assert all(span.parent is None for span in statements)
        assert {*linked} <= calls
        assert max(len(span.links) for span in statements) > 1
    text = metrics.expose({}).decode()
    total = value(text, "incidentkit_calls_per_statement_sum", operation="SELECT")
    assert total > value(text, "incidentkit_calls_per_statement_count", operation="SELECT") > 0


async def test_statements_that_creates_share_on_sqlite_are_counted(sqlite_url: str) -> None:
    """Each statement that several creates share counts once."""
    metrics = PrometheusObserver()
    async with IncidentClient.open(sqlite_url, observer=metrics) as client:
        await asyncio.gather(
            *(client.create(f"Disk {n} is full", source="monitoring") for n in range(20))
        )
    text = metrics.expose({}).decode()
    statements = "incidentkit_statement_duration_seconds_count"
    assert 2 <= value(text, statements, operation="INSERT", outcome="ok") < 20


async def test_a_statement_names_its_server(migrated_postgres_url: str) -> None:
    """The span of a statement has the server and the database, and no account."""
    traces = Traces()
    async with IncidentClient.open(migrated_postgres_url, observer=traces.observer) as client:
        await client.list()
    place = urlsplit(migrated_postgres_url)
    (span, *_) = [span for span in traces.spans() if span.kind is SpanKind.CLIENT]
    assert span.attributes["server.address"] == place.hostname
    assert span.attributes["server.port"] == place.port
    assert span.attributes["db.namespace"] == place.path.strip("/")
    assert database_at("postgresql", "a:1,b:2/x") == Database("postgresql")
    assert database_at("postgresql", "[::1]:5432/x") == Database("postgresql", "::1", 5432, "x")
    assert database_at("sqlite", "/srv/incidents.db") == Database("sqlite")


async def test_the_use_of_the_pool_is_measured(migrated_postgres_url: str) -> None:
    """`/metrics` has the connections in use, the waiting calls and the timeouts of the pool."""
    options = StoreOptions(pool_size=1, max_overflow=0, pool_timeout=0.2)
    settings_ = Settings(migrated_postgres_url, store=options)
    client = IncidentClient.from_settings(settings_, observer=PrometheusObserver())
    async with client, ask(create_app(client, metrics=True)) as api:
        store: Any = client.store

        async def hold(_: object) -> None:
            calls = [asyncio.create_task(client.history(1)) for _ in range(2)]
            await asyncio.sleep(0)
            assert store.pool_use == PoolUse(in_use=1, waiting=2, maximum=1)
            for call in calls:
                with pytest.raises(StoreUnavailable, match="were in use"):
                    await call

        await store.transact(hold)
        text = (await api.get("/metrics")).text
    assert value(text, "incidentkit_pool_timeouts_total") == 2
    assert value(text, "incidentkit_pool_maximum_connections") == 1
    for name in ("connections", "waiting_calls"):
        assert samples(text)[f"incidentkit_pool_{name}", frozenset()] == 0


def test_what_the_server_refuses_is_counted(tmp_path: Path) -> None:
    """A request that the server refuses before the service sees it is among the requests."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'incidents.db'}"
    with service(tmp_path / "log", "--metrics", "--database-url", url) as running:
        refused = httpx2.get(f"{running.url}/incident/get", headers={"X-Filler": "a" * 70_000})
        assert refused.status_code == 431
        text = httpx2.get(f"{running.url}/metrics").text
    name = "http_server_request_duration_seconds_count"
    labels = {"http_request_method": "(other)", "http_route": "(none)"}
    assert value(text, name, http_response_status_code="431", **labels) == 1


async def test_a_failed_statement_has_its_sqlstate(migrated_postgres_url: str) -> None:
    """The span of a refused statement has the SQLSTATE, and not the text of the error."""
    import asyncpg

    traces = Traces()
    async with IncidentClient.open(migrated_postgres_url, observer=traces.observer) as client:
        connection = await asyncpg.connect(migrated_postgres_url)
        await connection.execute("DROP TABLE incident_event CASCADE")
        await connection.close()
        traces.exporter.clear()
        with pytest.raises(IncidentKitError):
            await client.history(1)
    (span,) = [span for span in traces.spans() if span.kind is SpanKind.CLIENT]
    assert span.attributes["db.response.status_code"] == "42P01"
    assert span.attributes["error.type"] == "42P01"
    assert (span.status.description, span.events) == (None, ())


SECRET = st.text("qxzj", min_size=12, max_size=20)


@settings(max_examples=15)
@given(SECRET, SECRET, SECRET, SECRET)
def test_nothing_that_incidents_say_is_observed(
    message: str, key: str, note: str, actor: str
) -> None:
    """No message, key, note, actor or token is in a label, an attribute, or the name of a span."""
    prometheus = PrometheusObserver()
    traces = Traces()
    secrets = {message, key, note, actor}
    foreign: Any = note

    async def work(observer: Any) -> None:
        async with IncidentClient.open(MEMORY, observer=observer) as client:
            with acting_as(actor):
                made = await client.create(
                    message, source="monitoring", dedup_key=key, idempotency_key=key
                )
                await client.update_status(made.incident_id, "completed", note=note)
                await client.note(made.incident_id, note)
                await client.search(text=message)
                token = await client.tokens.create(actor[:12], ["read"])
                secrets.add(token.secret)
                await client.create(message, source="monitoring", dedup_key=key)
                for call in (
                    client.update_status(made.incident_id, "new"),
                    client.create(message, source=foreign),
                    client.create(f"{message}!", source="monitoring", idempotency_key=key),
                    client.update_status(99, "completed", note=note, idempotency_key=f"{key}!"),
                    client.read_changes(key),
                ):
                    with pytest.raises(IncidentKitError):
                        await call

    observers: tuple[Any, ...] = (prometheus, traces.observer)
    for observer in observers:
        asyncio.run(work(observer))
        # A driver's errors repeat values.
        for scope in (observer.call("create"), observer.statement("INSERT", Database("sqlite"))):
            with pytest.raises(ValueError, match=message), scope:
                raise ValueError(message)
    seen = prometheus.expose({}).decode()
    seen += "".join(span.to_json() for span in traces.spans())
    seen += "".join(f"{name} {point.attributes}" for name, point in traces.points())
    assert "IdempotencyKeyReused" in seen
    assert len(secrets) > len({message, key, note, actor})
    for secret in secrets:
        assert secret not in seen


async def test_the_dashboard_shows_metrics_that_there_are() -> None:
    """Each expression of the Grafana dashboard uses existing metrics with their labels."""
    text = await exercise(MEMORY)
    names = {name for name, _ in samples(text)} | {f"incidentkit_{name}" for name in GAUGES}
    labels = {label for _, pairs in samples(text) for label, _ in pairs}
    dashboard = json.loads((ROOT / "examples/grafana-dashboard.json").read_text("utf-8"))
    shown = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            used = set(re.findall(r"\b(?:incidentkit|http_server)_\w+", target["expr"]))
            assert used
            assert used <= names
            for by in re.findall(r"by \(([^)]*)\)", target["expr"]):
                assert set(by.split(", ")) <= labels
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels
            shown |= used
    families = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in shown}
    assert families == {re.sub(r"_(total|bucket|count|sum|created)$", "", name) for name in names}


async def test_the_age_of_what_holds_the_feed_up_is_a_gauge(two_phase_url: str) -> None:
    """While a transaction stays open, `/metrics` has its age."""
    import asyncpg

    client = IncidentClient.open(two_phase_url, observer=PrometheusObserver())
    connection = await asyncpg.connect(two_phase_url)
    try:
        async with client, ask(create_app(client, metrics=True)) as api:
            await connection.execute("BEGIN")
            await connection.fetchval("SELECT pg_current_xact_id()")
            limit = datetime.now(UTC) + timedelta(seconds=30)
            age = 0.0
            while not age and datetime.now(UTC) < limit:
                text = (await api.get("/metrics")).text
                age = samples(text)["incidentkit_feed_blocker_age_seconds", frozenset()]
                await asyncio.sleep(0.2)
            assert age >= 5
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", True),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", False),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", False),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x", False),
    ],
)
async def test_the_trace_id_is_the_request_id(given: str, *, expected: bool) -> None:
    """A request without `X-Request-ID` has the trace id of a valid `traceparent`."""
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with ask(create_app(IncidentClient.open(MEMORY))) as api:
        plain = await api.get("/health/live", headers={"traceparent": given})
        assert (plain.headers["x-request-id"] == trace_id) is expected
        named = {"traceparent": given, "X-Request-ID": "mine"}
        assert (await api.get("/health/live", headers=named)).headers["x-request-id"] == "mine"


def test_serve_adds_up_its_workers_and_logs_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any worker answers with the requests of all workers, and each line on stderr is JSON."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'incidents.db'}"
    arguments = ("--workers", "2", "--metrics", "--log-format", "json", "--database-url", url)
    log = tmp_path / "log"
    file = tmp_path / "a \x1b[31m folder" / ".env"
    file.parent.mkdir()
    file.write_text("INCIDENTKIT_MAX_STALENESS=1\n", "utf-8")
    monkeypatch.chdir(file.parent)
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    given = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    with service(log, *arguments) as running:
        for _ in range(20):
            httpx2.get(f"{running.url}/incident/get", headers=given).raise_for_status()
        text = httpx2.get(f"{running.url}/metrics").text
        running.end(signal.SIGTERM)
    route = {"http_request_method": "GET", "http_route": "/incident/get"}
    requests = "http_server_request_duration_seconds_count"
    assert value(text, requests, http_response_status_code="200", **route) == 20
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert lines[0]["message"] == f"Using settings from {file}"
    assert (lines[0]["level"], lines[0]["logger"]) == ("info", "incidentkit.cli")
    (line, *_) = [line for line in lines if line.get("route") == "/incident/get"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert (line["level"], line["logger"]) == ("info", "incidentkit.http")
    assert (line["method"], line["status"], line["request_id"]) == ("GET", 200, trace_id)
