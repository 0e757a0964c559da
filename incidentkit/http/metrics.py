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

TIMEOUT: Final = 3.0
"""Seconds after which a scrape goes on without what the database tells."""

MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@runtime_checkable
class Exposer(Protocol):
    """An observer whose metrics can be scraped."""

    def expose(self, gauges: Mapping[str, float]) -> bytes:
        """Return all metrics, with these present values among them."""
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
    client: IncidentClient = request.scope["app"].client
    observer: Any = client.observer
    gauges = await present(client)
    return Response(observer.expose(gauges), headers={"Content-Type": MEDIA_TYPE})


async def present(client: IncidentClient) -> dict[str, float]:
    """Return the gauges; without an answer of the database, some are missing."""
    gauges: dict[str, float] = {}
    with suppress(IncidentKitError, TimeoutError):
        async with asyncio.timeout(TIMEOUT):
            blocker = await client.feed_blocker()
        since = None if blocker is None else blocker.since
        age = 0.0 if since is None else (datetime.now(UTC) - since).total_seconds()
        gauges["feed_blocker_age_seconds"] = max(0.0, age)
    if client.cache_available is not None:
        gauges["cache_available"] = float(client.cache_available)
    return gauges


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
