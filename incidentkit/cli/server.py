"""The REST service under Uvicorn."""

from __future__ import annotations

import gc
import logging
import socket
from contextlib import nullcontext
from functools import partial

import click
import uvicorn
from starlette.applications import Starlette

from incidentkit.cli.exposure import check_exposure, exposed_app, is_local
from incidentkit.cli.limits import backlog, connection_limit, max_open_files
from incidentkit.cli.listening import (
    Address,
    Inherited,
    Listener,
    Tcp,
    Unix,
    free_port,
    inherit,
    listen_on_file,
)
from incidentkit.cli.log import LOG, LogFormat, configure_logging, logging_config
from incidentkit.cli.metrics import prometheus_observer, shared_metrics
from incidentkit.cli.running import run_coroutine
from incidentkit.cli.supervision import GRACE, Server, Supervisor, farewells, stop_with_parent
from incidentkit.client import IncidentClient
from incidentkit.settings import Settings
from incidentkit.store.sqlite.url import in_memory
from incidentkit.version import __version__

logger = logging.getLogger("incidentkit")


def run(
    settings: Settings,
    address: Address,
    workers: int,
    *,
    metrics: bool = False,
    log_format: LogFormat = "line",
) -> bool:
    """Run the service until a signal stops it; return False if something else did.

    Args:
        settings: The servers that the service uses.
        address: Where to listen.
        workers: Number of processes, at least 1.
        metrics: Whether to serve ``/metrics``.
        log_format: How each record of the log is written.

    Raises:
        UsageError: If several processes would each have a database of their own, or if there is no
            socket to inherit.
        ClickException: If the address cannot be used, or anyone who can reach it could change
            incidents.
        IncidentKitError: If the database, or a required cache, cannot be used.
    """
    if workers > 1 and in_memory(settings.database_url):
        raise click.UsageError(
            "several --workers cannot share a database in memory: use a file or PostgreSQL"
        )
    # Before any other file takes its number.
    inherited = inherit(address) if isinstance(address, Inherited) else None
    configure_logging(log_format)
    try:
        return _serve(settings, address, inherited, workers, metrics=metrics, log_format=log_format)
    finally:
        # Before the program says anything else, such as why it did not start.
        LOG.flush()


def _serve(  # noqa: PLR0913
    settings: Settings,
    address: Address,
    inherited: Listener | None,
    workers: int,
    *,
    metrics: bool,
    log_format: LogFormat,
) -> bool:
    client = IncidentClient.from_settings(settings)
    local = is_local(address, None if inherited is None else inherited.socket)
    run_coroutine(check_servers(client, settings, address, local=local))
    config = _configure(settings, workers, local=local, metrics=metrics, log_format=log_format)
    listener = inherited
    if isinstance(address, Unix):
        listener = listen_on_file(address, config.backlog)
        farewells.insert(0, listener.remove)
    try:
        if isinstance(address, Tcp):
            config.host, config.port = address.host, free_port(address)
            host = f"[{address.host}]" if ":" in address.host else address.host
            url = f"http://{host}:{config.port}"
            logger.info("incidentkit %s on %s, documentation on %s/docs", __version__, url, url)
        elif listener is not None:
            logger.info("incidentkit %s on %s", __version__, listener.name)
        sockets = None if listener is None else [listener.socket]
        if workers == 1:
            return _run_one(config, sockets)
        with shared_metrics() if metrics else nullcontext():
            return _run_several(config, sockets)
    except SystemExit as end:
        return not end.code
    finally:
        if listener is not None:
            listener.remove()


def _configure(
    settings: Settings, workers: int, *, local: bool, metrics: bool, log_format: LogFormat
) -> uvicorn.Config:
    store, open_files = settings.store, max_open_files()
    return uvicorn.Config(
        partial(make_app, settings, local=local, metrics=metrics),
        factory=True,
        workers=workers,
        lifespan="on",
        log_config=logging_config(log_format),
        access_log=False,
        http="incidentkit.cli.protocol:Protocol",
        ws="none",
        proxy_headers=False,
        server_header=False,
        backlog=backlog(open_files),
        limit_concurrency=connection_limit(open_files, store.pool_size + store.max_overflow),
        timeout_graceful_shutdown=GRACE,
    )


def _run_one(config: uvicorn.Config, sockets: list[socket.socket] | None) -> bool:
    server = Server(config)
    server.run(sockets)
    return server.started


def _run_several(config: uvicorn.Config, sockets: list[socket.socket] | None) -> bool:
    """Run the workers; each gets the settings with the pickled configuration."""
    supervisor = Supervisor(config, sockets=sockets or [config.bind_socket()])
    supervisor.run()
    # It also returns when a worker cannot start.
    return supervisor.signalled


def make_app(settings: Settings, *, local: bool, metrics: bool = False) -> Starlette:
    """Return the app on the servers that the settings name; each worker makes one."""
    stop_with_parent()
    observer = prometheus_observer() if metrics else None
    client = IncidentClient.from_settings(settings, observer=observer)
    app = exposed_app(client, settings, local=local, metrics=metrics)
    # Loaded modules live as long as the process: keep the garbage collector from visiting them.
    gc.freeze()
    return app


async def check_servers(
    client: IncidentClient, settings: Settings, address: Address, *, local: bool
) -> None:
    """Open the client once, so that an error is reported before the server starts.

    Args:
        client: A client that is not open; it is closed again.
        settings: Whether the cache must answer. Otherwise the service logs that it does not.
        address: Where the service listens.
        local: Whether only programs on this machine reach the address.

    Raises:
        Refused: If anyone who can reach the address could change incidents.
    """
    try:
        await (client.connect() if settings.redis_required else client.store.open())
        await check_exposure(client, settings, address, local=local)
    finally:
        await client.close()
