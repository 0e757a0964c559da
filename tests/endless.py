"""Searches and deep pages on SQLite that end only when they are interrupted."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event

from incidentkit.store.sqlite.threads import OwnConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from threading import Event

    from sqlalchemy import Engine, ExceptionContext

ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
STUBBORN = ENDLESS.replace("SELECT 1", "SELECT open_gate()")


class Endless:
    """Replaces scans by endless ones.

    Args:
        scans: Those of a host's engine; with pytest's monkeypatch, those of the store itself.
        gate: Scans do not notice an interrupt before it is set. None: they do at once.

    Attributes:
        on: Whether further scans are replaced.
    """

    def __init__(self, scans: Engine | pytest.MonkeyPatch, gate: Event | None = None) -> None:
        self.on = True
        self._gate = gate
        # Lists, since several threads add to them.
        self._begun: list[None] = []
        self._interrupted: list[None] = []
        if isinstance(scans, pytest.MonkeyPatch):
            self._patch(scans)
        else:
            event.listen(scans, "before_cursor_execute", self._replace_of_engine, retval=True)
            event.listen(scans, "handle_error", self._end_of_engine)

    @property
    def running(self) -> int:
        """Number of endless statements that are running."""
        return len(self._begun) - len(self._interrupted)

    async def until_running(self, number: int) -> None:
        """Wait until so many endless statements are running."""
        async with asyncio.timeout(60):
            while self.running != number:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = OwnConnection.run

        def replace(
            connection: OwnConnection, sql: str, values: Iterable[Any] = ()
        ) -> sqlite3.Cursor:
            sql, values = self._replace(connection.driver, sql, values)
            try:
                return run(connection, sql, values)
            except sqlite3.Error as error:
                self._end(sql, error)
                raise

        monkeypatch.setattr(OwnConnection, "run", replace)

    def _replace_of_engine(self, *arguments: Any) -> tuple[str, Any]:
        return self._replace(arguments[0].connection.dbapi_connection, *arguments[2:4])

    def _end_of_engine(self, context: ExceptionContext) -> None:
        self._end(context.statement, context.original_exception)

    def _replace(self, driver: Any, sql: str, values: Any) -> tuple[str, Any]:
        if not self.on or not ("MATCH" in sql or "deep_page" in sql):
            return sql, values
        self._begun.append(None)
        if self._gate is None:
            return ENDLESS, ()
        gate = self._gate
        driver.create_function("open_gate", 0, lambda: gate.wait(30))
        return STUBBORN, ()

    def _end(self, sql: str | None, error: BaseException) -> None:
        if sql in (ENDLESS, STUBBORN):
            assert "interrupted" in str(error)
            self._interrupted.append(None)


def before_statements(monkeypatch: pytest.MonkeyPatch, call: Callable[[str], None]) -> None:
    """Call a function with each statement of the SQLite store before it runs."""
    run = OwnConnection.run

    def run_after_call(
        connection: OwnConnection, sql: str, values: Iterable[Any] = ()
    ) -> sqlite3.Cursor:
        call(sql)
        return run(connection, sql, values)

    monkeypatch.setattr(OwnConnection, "run", run_after_call)
