"""Create the app around a client, and run its lifespan."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette

from incidentkit.client import IncidentClient
from incidentkit.domain.errors import InvalidSettings
from incidentkit.domain.values import MAX_STREAM_LIFETIME, MIN_STREAM_LIFETIME, STREAM_LIFETIME
from incidentkit.http.bounds import Bounds
from incidentkit.http.client_address import TrustedProxies
from incidentkit.http.docs import check_files
from incidentkit.http.parts import add_cors, metrics_of
from incidentkit.http.principals import Authenticate, Gate
from incidentkit.http.request_log import Appender, RequestLog
from incidentkit.http.routes import ADMINISTRATION, DOCS, OPERATIONS
from incidentkit.http.service import Service
from incidentkit.http.stop_signals import on_stop_signal

if TYPE_CHECKING:
    # It would load the libraries that read the environment, which a host need not use.
    from incidentkit.settings import RequestLog as RequestLogSetting


def create_app(  # noqa: PLR0913
    client: IncidentClient,
    *,
    request_log: RequestLogSetting = "log",
    cache_required: bool = False,
    docs: bool = True,
    stream_lifetime: float = STREAM_LIFETIME,
    cors: Sequence[str] = (),
    metrics: bool = False,
    authenticate: Authenticate | None = None,
    bounds: Bounds | None = None,
    trusted_proxies: Sequence[str] = (),
) -> Starlette:
    """Return the REST service on a client, to run alone or to mount in another app.

    Alone, it connects the client when it starts and closes it when it stops. A client that is
    already connected is left open.

    A host does not run the lifespan of an app that it mounts. Run :func:`lifespan` in the host's
    own, or connect the client yourself. In FastAPI or Starlette, under any prefix::

        incidents = create_app(IncidentClient.from_env())
        host = FastAPI(lifespan=lambda _: lifespan(incidents))
        host.mount("/incidents", incidents)

    Args:
        client: Does what requests ask for; used from the event loop that runs the app.
        request_log: Where each request is recorded: ``log`` is the logger ``incidentkit.http``,
            ``database`` is the logger and the table ``request_log``.
        cache_required: Whether ``/health/ready`` fails while the cache is unavailable.
        docs: Whether Swagger UI is served at ``/docs``.
        stream_lifetime: Seconds, 10 to 86400, after which a stream of changes ends; its reader
            resumes it with a new request. Some streams end up to a quarter earlier, so that their
            readers do not all come back at once.
        cors: The origins of pages that may use the service in a browser, such as
            ``https://board.example.com``; ``*`` is any. Empty: a browser keeps pages of other
            origins out.
        metrics: Whether ``/metrics`` is served for Prometheus. The client must be opened with
            ``observer=PrometheusObserver()``.
        authenticate: Returns the sender of a request by its ASGI scope, or None if it is unknown,
            such as :class:`~incidentkit.http.authentication.TokenAuth`. Only then, an administrator
            can purge. None: every request is answered, and the actor is the user whom a host's
            middleware has put into the scope.
        bounds: What one sender may do at a time, if requests are authenticated; None: 20 requests,
            10 streams or waiting polls, and 2 searches.
        trusted_proxies: Addresses and networks of proxies, such as ``10.0.0.0/8``, and ``unix`` for
            one at a Unix socket. Only from them, ``X-Forwarded-For`` names the client.

    Raises:
        InvalidSettings: If ``request_log`` is another value, or the client cannot write it; if
            ``stream_lifetime`` is out of range; if ``cors`` has something else than origins; if
            ``metrics`` is true and the client has another observer or none; if a trusted proxy is
            no address; or if ``docs`` is true and the program was frozen without the files of
            Swagger UI.
    """
    log = _request_log(client, request_log)
    if not MIN_STREAM_LIFETIME <= stream_lifetime <= MAX_STREAM_LIFETIME:
        reason = f"must be from {MIN_STREAM_LIFETIME} to {MAX_STREAM_LIFETIME} seconds"
        raise InvalidSettings("stream_lifetime", reason)
    if docs:
        check_files()
    gate = None if authenticate is None else Gate(authenticate)
    operations = [*OPERATIONS]
    if gate is not None:
        operations += ADMINISTRATION
    if docs:
        operations += DOCS
    if metrics:
        operations += metrics_of(client)
    app = Service(
        client,
        operations,
        request_log=log,
        cache_required=cache_required,
        gate=gate,
        bounds=bounds or Bounds(),
        proxies=TrustedProxies(trusted_proxies),
        lifespan=lifespan,
    )
    app.readers.lifetime = stream_lifetime
    if cors:
        add_cors(app, cors)
    return app


def _request_log(client: IncidentClient, setting: RequestLogSetting) -> RequestLog | None:
    if setting not in ("log", "database"):
        raise InvalidSettings("request_log", "must be one of: log, database")
    if setting == "log":
        return None
    if not isinstance(client.store, Appender):
        raise InvalidSettings("request_log", "must be log: the client's store has no request log")
    return RequestLog(client.store)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Run an app of :func:`create_app`: connect its client, and write the request log at the end.

    A client that is already connected is left open; otherwise it is closed at the end. A host that
    mounts the app runs this in its own lifespan.

    Raises:
        TypeError: If it is another app.
        StoreUnavailable: If the database cannot be reached.
        SchemaOutOfDate: With the command to run.
        CacheUnavailable: If the cache is required and does not answer.
        WrongEventLoop: If the client is open on another event loop.
    """
    if not isinstance(app, Service):
        raise TypeError("lifespan() needs an app of create_app()")
    connects = not app.client.connected
    # A client that is open on another event loop is refused now, not with each request.
    await app.client.connect()
    try:
        # Listen even without a reader: one may come right after the signal.
        with on_stop_signal(lambda: None):
            yield
    finally:
        if app.request_log is not None:
            await app.request_log.close()
        if connects:
            await app.client.close()
