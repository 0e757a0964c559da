"""Services for remote clients: in this event loop, and behind a socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, Self

import httpx2
import uvicorn

from incidentkit import IncidentClient, RemoteOptions, Scope
from incidentkit.http import create_app
from incidentkit.http.principals import Principal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

    from starlette.types import ASGIApp, Receive, Send
    from starlette.types import Scope as AsgiScope

ACTOR = "tests.actor"


class Trusting:
    """Stands for a host in front of the service: the actor that a request names is its sender.

    Args:
        app: The service, with `authenticate=sender`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        others = [(name, value) for name, value in scope["headers"] if name != b"x-actor"]
        actors = [value.decode() for name, value in scope["headers"] if name == b"x-actor"]
        scope = {**scope, "headers": others, ACTOR: "".join(actors)}
        await self._app(scope, receive, send)


async def sender(scope: AsgiScope) -> Principal:
    """Return a sender that may do everything, named as the host says."""
    return Principal(scope.get(ACTOR, ""), frozenset(Scope))


def trusting_service(client: IncidentClient) -> ASGIApp:
    """Return the service of a client, behind a host that trusts `X-Actor`."""
    return Trusting(create_app(client, authenticate=sender))


@asynccontextmanager
async def over_asgi(database_url: str, **options: Any) -> AsyncIterator[IncidentClient]:
    """Open a client of a service in this event loop."""
    async with IncidentClient.open(database_url, **options) as client:
        transport = httpx2.ASGITransport(trusting_service(client), raise_app_exceptions=False)
        remote = RemoteOptions(transport=transport)
        async with IncidentClient.open("http://service/", remote=remote) as incidents:
            yield incidents


class Host:
    """A server in a thread, with a service under a prefix of its own for each database."""

    def __init__(self) -> None:
        self._apps: dict[str, ASGIApp] = {}
        self._numbers = count(1)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._answer, interface="asgi3", log_config=None, access_log=False, lifespan="off"
            )
        )
        self._listener = socket.create_server(("127.0.0.1", 0))
        # asyncio sets it only on sockets that were made with the number of the protocol.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._started.set()
        await self._server.serve(sockets=[self._listener])

    async def _answer(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        prefix = "/" + scope["path"].split("/")[1]
        await self._apps[prefix]({**scope, "root_path": prefix}, receive, send)

    @contextmanager
    def serving(self, database_url: str, **options: Any) -> Iterator[str]:
        """Serve a database, and return the URL of the service."""
        client = IncidentClient.open(database_url, **options)
        prefix = f"/{next(self._numbers)}"
        self._apps[prefix] = trusting_service(client)
        self._run(client.connect())
        try:
            yield f"http://127.0.0.1:{self._listener.getsockname()[1]}{prefix}"
        finally:
            self._run(client.close())
            del self._apps[prefix]

    @asynccontextmanager
    async def open(self, database_url: str, **options: Any) -> AsyncIterator[IncidentClient]:
        """Open a client of a service on a database."""
        with self.serving(database_url, **options) as url:
            async with IncidentClient.open(url) as incidents:
                yield incidents

    def _run(self, call: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(call, self._loop).result()
