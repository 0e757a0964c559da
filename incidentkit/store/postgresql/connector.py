"""Opens connections to one PostgreSQL server, directly or through a pooler."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import asyncpg

from incidentkit.store.options import StoreOptions
from incidentkit.store.postgresql.connection import PostgresConnection, Preparing
from incidentkit.store.postgresql.driver import ISOLATION, reads_committed, unreadable_url
from incidentkit.store.postgresql.errors import UNREADABLE_URL
from incidentkit.store.postgresql.poolers import find_pooler
from incidentkit.store.postgresql.url import Server, refused_parameter

logger = logging.getLogger("incidentkit.store")


class Connector:
    """Opens connections to one server.

    Args:
        server: The server.
        options: Time limits, and whether statements are prepared.
    """

    def __init__(self, server: Server, options: StoreOptions) -> None:
        self._server = server
        self._options = options
        self._preparing = Preparing(options.prepared_statements)
        self._connected = False
        # Settings to request on connecting; a pooler may refuse them, or not pass them on.
        self._settings: Mapping[str, str] = ISOLATION
        self._pooled = False

    async def __call__(self) -> PostgresConnection:
        """Open a connection. Exceptions of asyncpg are not translated.

        Raises:
            InvalidSettings: If the URL cannot be used, or the server refuses a parameter of it.
        """
        try:
            driver = await self._connect()
        except asyncpg.PostgresError as error:
            refused = refused_parameter(self._server, error)
            if refused is None:
                raise
            raise refused from error
        except UNREADABLE_URL as error:
            if self._connected or isinstance(error, OSError):
                raise
            # Without its cause, which shows parts of the URL.
            raise unreadable_url() from None
        log = _log_statement if self._options.echo else None
        connection = PostgresConnection(driver, preparing=self._preparing, log=log)
        try:
            if not self._connected:
                await self._find_out(driver)
            if self._pooled or not self._settings:
                connection.reads_committed = await reads_committed(driver)
        except BaseException:
            driver.terminate()
            raise
        return connection

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        arguments = {"timeout": self._options.connect_timeout, **self._server.arguments}
        given = arguments.pop("server_settings", None) or {}
        while True:
            try:
                return await asyncpg.connect(
                    **arguments,
                    server_settings={**given, **self._settings},
                    command_timeout=self._options.statement_timeout,
                    statement_cache_size=0,
                )
            except asyncpg.PostgresError as error:
                if not self._settings or "startup parameter" not in str(error):
                    raise
                self._settings = {}

    async def _find_out(self, driver: asyncpg.Connection[asyncpg.Record]) -> None:
        """Prepare statements unless there is a pooler, or as the options say."""
        self._pooled = await find_pooler(driver)
        if self._preparing.allowed is None:
            self._preparing.allowed = not self._pooled
        self._connected = True


def _log_statement(text: str, seconds: float) -> None:
    logger.info("%s (%.1f ms)", text, seconds * 1000)
