"""The hooks of a server beyond ASGI: a signal that it stops, and dropping a connection."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from incidentkit import IncidentClient
from incidentkit.cli.protocol import Protocol
from incidentkit.feed import EMPTY
from incidentkit.http import create_app, server_hooks, streams
from incidentkit.http.server_hooks import EXTENSION
from tests.http.conftest import MEMORY, Serve, service_on, serving

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import Receive, Scope, Send

    from incidentkit.http.server_hooks import ServerHooks


def changes(query: bytes, accept: bytes, extensions: object) -> dict[str, Any]:
    """Return the scope of a request for changes."""
    return {
        "type": "http",
        "method": "GET",
        "path": "/incident/changes",
        "query_string": query,
        "headers": [(b"accept", accept)],
        "extensions": extensions,
    }


class Connection:
    """A connection of a server that offers its hooks.

    Args:
        takes: The number of messages that the reader takes before it stops reading.
    """

    def __init__(self, takes: int = 100) -> None:
        self.sent: list[Any] = []
        self.stopping = asyncio.Event()
        self.dropped = asyncio.Event()
        self._takes = takes
        self._asked = False

    @property
    def hooks(self) -> ServerHooks:
        """The content of the extension."""
        return {"stopping": self.stopping, "abort": self.dropped.set}

    async def receive(self) -> Any:
        """Return the empty body, and the end once the connection is dropped."""
        if not self._asked:
            self._asked = True
            return {"type": "http.request"}
        await self.dropped.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        """Keep the message, or never take it."""
        if len(self.sent) == self._takes:
            await asyncio.Event().wait()
        self.sent.append(message)

    async def answered(self, app: Starlette, scope: dict[str, Any]) -> None:
        """Wait for the answer to a request."""
        async with asyncio.timeout(10):
            await app(scope, self.receive, self.send)


@pytest.mark.parametrize("accept", [b"*/*", b"text/event-stream"])
async def test_a_server_that_stops_ends_its_readers(accept: bytes) -> None:
    """When the server signals that it stops, a poll is answered and a stream completed."""
    connection = Connection()
    async with IncidentClient.open(MEMORY) as client:
        app = service_on(client)
        scope = changes(b"wait=30", accept, {EXTENSION: connection.hooks})
        asyncio.get_running_loop().call_later(0.2, connection.stopping.set)
        await connection.answered(app, scope)
    assert connection.stopping.is_set()
    start, *bodies = connection.sent
    assert start["status"] == 200
    assert not bodies[-1].get("more_body", False)
    assert app.readers.count == 0
    if accept == b"*/*":
        assert json.loads(bodies[0]["body"]) == {"changes": [], "next": EMPTY}


@pytest.mark.parametrize("offered", [True, False])
async def test_a_slow_reader_is_dropped_where_the_server_can(
    monkeypatch: pytest.MonkeyPatch, offered: bool
) -> None:
    """A stream that its reader does not take ends, and its connection if the server can drop it."""
    monkeypatch.setattr(streams, "SEND_TIMEOUT", 0.01)
    connection = Connection(takes=2)
    async with IncidentClient.open(MEMORY) as client:
        app = service_on(client)
        extensions = {EXTENSION: connection.hooks} if offered else None
        scope = changes(b"", b"text/event-stream", extensions)
        await connection.answered(app, scope)
    assert connection.dropped.is_set() is offered
    assert app.readers.count == 0


async def test_a_loop_that_is_closed_is_not_woken() -> None:
    """A listener left behind by a closed event loop does not fail on a signal."""
    listeners: list[Any] = []

    class Hearing:
        def __init__(self, listener: Any) -> None:
            listeners.append(listener)

        def __enter__(self) -> None:
            """Do nothing."""

        def __exit__(self, *_: object) -> None:
            """Do nothing."""

    def wait() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(server_hooks.wait_for_stop({}))
        loop.run_until_complete(asyncio.sleep(0))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(server_hooks, "on_stop_signal", Hearing)
        await asyncio.to_thread(wait)
    (listener,) = listeners
    listener()


def test_our_server_offers_both_hooks(serve: Serve) -> None:
    """Each request on a connection gets the hooks of that connection."""
    app = create_app(IncidentClient.open(MEMORY))
    seen: list[Any] = []

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            seen.append(scope["extensions"][EXTENSION])
        await app(scope, receive, send)

    api = serve(noting, http=Protocol)
    for _ in range(2):
        assert api.get("/health/live").status_code == 200
    with httpx2.Client(base_url=api.base_url) as other:
        assert other.get("/health/live").status_code == 200
    first, second, third = seen
    assert first is second is not third
    assert not first["stopping"].is_set()
    assert callable(first["abort"])


def test_our_server_says_that_it_stops() -> None:
    """A stream is completed when the server stops, even without a signal."""
    app = create_app(IncidentClient.open(MEMORY))
    with httpx2.Client() as api:
        with serving(app, http=Protocol, timeout_graceful_shutdown=20) as url:
            request = api.build_request(
                "GET", f"{url}/incident/changes", headers={"Accept": "text/event-stream"}
            )
            stream = api.send(request, stream=True)
        assert stream.read().startswith(b"retry: ")
