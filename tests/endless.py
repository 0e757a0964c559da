"""Searches and deep pages on SQLite that end only when they are interrupted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

if TYPE_CHECKING:
    from threading import Event

    from sqlalchemy import Engine, ExceptionContext

ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
STUBBORN = ENDLESS.replace("SELECT 1", "SELECT open_gate()")


class Endless:
    """Replaces the scans of an engine by endless ones.

    Args:
        engine: The engine.
        gate: Scans do not notice an interrupt before it is set. None: they do at once.

    Attributes:
        on: Whether further scans are replaced.
    """

    def __init__(self, engine: Engine, gate: Event | None = None) -> None:
        self.on = True
        self._gate = gate
        # Lists, since several threads add to them.
        self._begun: list[None] = []
        self._interrupted: list[None] = []
        event.listen(engine, "before_cursor_execute", self._replace, retval=True)
        event.listen(engine, "handle_error", self._end)

    @property
    def running(self) -> int:
        """Number of endless statements that are running."""
        return len(self._begun) - len(self._interrupted)

    async def until_running(self, number: int) -> None:
        """Wait until so many endless statements are running."""
        async with asyncio.timeout(60):
            while self.running != number:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def _replace(self, *arguments: Any) -> tuple[str, Any]:
        statement, parameters = arguments[2:4]
        if not self.on or not ("MATCH" in statement or "deep_page" in statement):
            return statement, parameters
        self._begun.append(None)
        if self._gate is None:
            return ENDLESS, ()
        gate = self._gate
        driver = arguments[0].connection.dbapi_connection
        driver.create_function("open_gate", 0, lambda: gate.wait(30))
        return STUBBORN, ()

    def _end(self, context: ExceptionContext) -> None:
        if context.statement in (ENDLESS, STUBBORN):
            assert "interrupted" in str(context.original_exception)
            self._interrupted.append(None)
