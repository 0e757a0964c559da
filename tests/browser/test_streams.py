"""The EventSource of a real browser survives outages of the service and its database."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from incidentkit import IncidentClient
from incidentkit.http.streams import MAX_READERS
from tests.browser.conftest import until
from tests.servers import HOST

if TYPE_CHECKING:
    from tests.browser.conftest import Browser, Service

OPEN = """
const [name] = arguments;
const source = new EventSource("/incident/changes?after=latest");
const board = {source, seen: [], opened: 0, errors: 0, problem: null};
source.onopen = () => { board.opened += 1; };
source.onerror = () => { board.errors += 1; };
source.addEventListener("created", (event) => {
  board.seen.push(JSON.parse(event.data).incident_id);
});
source.addEventListener("problem", (event) => {
  board.problem = JSON.parse(event.data).code;
  source.close();
});
window[name] = board;
"""


class Board:
    """A page that follows the changes from now on.

    Args:
        browser: Has the page of the service open.
        name: Distinguishes the boards of the page.
    """

    def __init__(self, browser: Browser, name: str) -> None:
        self._browser = browser
        self._name = name
        browser.run(OPEN, name)

    def get(self, member: str) -> Any:
        """Return a member of the board's state."""
        return self._browser.run(f"return window[arguments[0]].{member};", self._name)

    def sees(self, *incident_ids: int) -> None:
        """Wait until exactly these incidents were announced, in this order."""
        until(lambda: len(self.get("seen")) >= len(incident_ids))
        assert self.get("seen") == [*incident_ids]

    def opens(self, times: int) -> None:
        """Wait until the stream has begun that often."""
        until(lambda: self.get("opened") >= times)


def create(service: Service) -> None:
    """Create an incident, even while the service is down."""

    async def report() -> None:
        async with IncidentClient.open(service.postgres.url) as incidents:
            await incidents.create("Disk is full", source="monitoring")

    asyncio.run(report())


def test_a_board_outlives_restarts(browser: Browser, service: Service, origin: str) -> None:
    """Restarts of PostgreSQL and of the service lose nothing, and end no board.

    The board begins on an empty database, and the first incident comes while it reconnects.
    """
    browser.go(f"{origin}/health/live")
    first = Board(browser, "first")
    first.opens(1)
    service.stop()
    create(service)
    # The second one tells that the board has come back in vain.
    until(lambda: first.get("errors") >= 2)
    assert first.get("source.readyState") == 0
    service.start()
    first.sees(1)
    opened = first.get("opened")
    service.postgres.stop()
    until(lambda: not service.ready)
    second = Board(browser, "second")
    second.opens(1)
    service.postgres.start()
    until(lambda: service.ready)
    create(service)
    first.sees(1, 2)
    assert first.get("opened") == opened
    # It began during the outage, so where it begins is known only some time after it.
    created = 2
    while not (seen := second.get("seen")):
        create(service)
        created += 1
    assert seen == [*range(seen[0], seen[-1] + 1)]
    assert second.get("opened") == 1
    first.sees(*range(1, created + 1))


@pytest.mark.parametrize("origin", ["direct"], indirect=True)
def test_a_board_waits_for_a_place(browser: Browser, service: Service, origin: str) -> None:
    """While the limit of readers is reached, a board reconnects until a place is free."""
    browser.go(f"{origin}/health/live")
    request = (
        b"GET /incident/changes HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
    )
    with ExitStack() as others:
        for _ in range(MAX_READERS):
            other = others.enter_context(socket.create_connection((HOST, service.port)))
            other.sendall(request)
            assert other.recv(1)
        board = Board(browser, "board")
        board.opens(1)
        until(lambda: board.get("source.readyState") == 0)
    board.opens(2)
    create(service)
    board.sees(1)


@pytest.mark.parametrize("origin", ["direct"], indirect=True)
def test_a_board_learns_that_its_cursor_is_unknown(
    browser: Browser, service: Service, origin: str
) -> None:
    """If the database is replaced, the stream sends a problem with its code, and the board ends."""
    browser.go(f"{origin}/health/live")
    board = Board(browser, "board")
    board.opens(1)
    create(service)
    board.sees(1)

    async def restore_another() -> None:
        connection = await asyncpg.connect(service.postgres.url)
        await connection.execute("UPDATE incident_event SET nonce = nonce / 2 + 1")
        await connection.close()

    asyncio.run(restore_another())
    create(service)
    assert until(lambda: board.get("problem")) == "unknown_cursor"
    assert board.get("source.readyState") == 2
