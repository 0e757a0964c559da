"""Answer with the metrics of the service in Prometheus's text format."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, Protocol, runtime_checkable

from starlette.requests import Request
from starlette.responses import Response

from incidentkit.client import IncidentClient
from incidentkit.domain.errors import IncidentKitError, InvalidSettings
from incidentkit.http.operation import Operation
from incidentkit.http.principals import READ
from incidentkit.http.service import Service
from incidentkit.observing import Pooled

TIMEOUT: Final = 3.0
"""Seconds that a scrape waits for the database; then it leaves out what depends on it."""

MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@runtime_checkable
class Exposer(Protocol):
    """An observer whose metrics can be scraped."""

    def expose(self, present: Mapping[str, float]) -> bytes:
        """Return all metrics, including gauges with these current values."""
        ...


def check_observer(client: IncidentClient) -> None:
    """Raise unless the client has an observer whose metrics can be scraped.

    Raises:
        InvalidSettings: With the argument that is missing.
    """
    if not isinstance(client.observer, Exposer):
        raise InvalidSettings(
            "metrics", "needs a client that is opened with observer=PrometheusObserver()"
        )


async def metrics(request: Request, _: Mapping[str, Any]) -> Response:
    """Answer with all metrics."""
    service: Service = request.scope["app"]
    observer: Any = service.client.observer
    values = await present(service.client)
    values["readers"] = service.readers.count
    return Response(observer.expose(values), headers={"Content-Type": MEDIA_TYPE})


async def present(client: IncidentClient) -> dict[str, float]:
    """Return the current values of gauges, without some if the database does not answer."""
    values: dict[str, float] = {}
    with suppress(IncidentKitError, TimeoutError):
        async with asyncio.timeout(TIMEOUT):
            blocker = await client.feed_blocker()
        since = None if blocker is None else blocker.since
        age = 0.0 if since is None else (datetime.now(UTC) - since).total_seconds()
        values["feed_blocker_age_seconds"] = max(0.0, age)
    if client.cache_available is not None:
        values["cache_available"] = float(client.cache_available)
    use = client.store.pool_use if isinstance(client.store, Pooled) else None
    if use is not None:
        values["pool_connections"] = use.in_use
        values["pool_maximum_connections"] = use.maximum
        values["pool_waiting_calls"] = use.waiting
    return values


METRICS: Final = (
    Operation(
        "GET",
        "/metrics",
        "metrics",
        "Metrics for Prometheus",
        metrics,
        scope=READ,
        documented=False,
    ),
)
"""The operations of an app with metrics."""
