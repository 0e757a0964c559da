"""The REST service under Uvicorn."""

from __future__ import annotations

import gc
import logging
import socket
from functools import partial

import click
import uvicorn
from starlette.applications import Starlette

from incidentkit.cli.exposure import check_exposure, exposed_app
from incidentkit.cli.log import LOGGING, configure_logging
from incidentkit.cli.running import run_coroutine
from incidentkit.cli.supervision import GRACE, Server, Supervisor, stop_with_parent
from incidentkit.cli.text import harmless
from incidentkit.client import IncidentClient
from incidentkit.settings import Settings
from incidentkit.store.sqlite.url import in_memory
from incidentkit.version import __version__

logger = logging.getLogger("incidentkit")


def run(settings: Settings, host: str, port: int, workers: int) -> bool:
    """Run the service until a signal stops it; return False if something else did.

    Args:
        settings: The servers that the service uses.
        host: The address to listen on.
        port: The port, 0 to 65535; 0 picks a free one.
        workers: Number of processes, at least 1.

    Raises:
        UsageError: If several processes would each have a database of their own.
        ClickException: If the address or the port cannot be used, or everybody who reaches the
            address could change incidents.
        IncidentKitError: If the database, or a required cache, cannot be used.
    """
    if workers > 1 and in_memory(settings.database_url):
        raise click.UsageError(
            "several --workers cannot share a database in memory: use a file or PostgreSQL"
        )
    configure_logging()
    client = IncidentClient.from_settings(settings)
    run_coroutine(check_servers(client, settings, host))
    port = _free_port(host, port)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    logger.info("incidentkit %s on %s, documentation on %s/docs", __version__, url, url)
    config = uvicorn.Config(
        partial(make_app, settings, host),
        factory=True,
        host=host,
        port=port,
        workers=workers,
        lifespan="on",
        log_config=LOGGING,
        access_log=False,
        http="incidentkit.cli.protocol:Protocol",
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE,
    )
    try:
        return _run_one(config) if workers == 1 else _run_several(config)
    except SystemExit as end:
        return not end.code


def _run_one(config: uvicorn.Config) -> bool:
    server = Server(config)
    server.run()
    return server.started


def _run_several(config: uvicorn.Config) -> bool:
    """Run the workers; each gets the settings with the pickled configuration."""
    supervisor = Supervisor(config, sockets=[config.bind_socket()])
    supervisor.run()
    # It also returns when a worker cannot start.
    return supervisor.signalled


def make_app(settings: Settings, host: str) -> Starlette:
    """Return the app on the servers that the settings name; each worker makes one."""
    stop_with_parent()
    app = exposed_app(settings, host)
    # Loaded modules live as long as the process: keep the garbage collector from visiting them.
    gc.freeze()
    return app


async def check_servers(client: IncidentClient, settings: Settings, host: str) -> None:
    """Open the client once, so that an error is reported before the server starts.

    Args:
        client: A client that is not open; it is closed again.
        settings: Whether the cache must answer. Otherwise the service logs that it does not.
        host: The address to listen on.

    Raises:
        Refused: If everybody who reaches the address could change incidents.
    """
    try:
        await (client.connect() if settings.redis_required else client.store.open())
        await check_exposure(settings, host, client)
    finally:
        await client.close()


def _free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0.

    Raises:
        ClickException: If the address or the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        # create_server() appends the address to the reason, as a Python tuple.
        reason = (error.strerror or "").partition(" (while")[0]
        raise click.ClickException(
            f"Cannot listen on {harmless(host)} port {port}: {reason}"
        ) from error
