"""Dispatch: from a request to its operation, and back with the response."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from incidentkit.domain.actor import acting_as
from incidentkit.domain.values import NAME_MAX_LENGTH
from incidentkit.http.bounds import Places
from incidentkit.http.log import log_answer
from incidentkit.http.operation import Operation
from incidentkit.http.principals import ACTOR, Gate, sender_of
from incidentkit.http.problems import problem_response
from incidentkit.http.requests import read_arguments
from incidentkit.http.streams import stream_instead

PART: Final = 64 * 1024
"""Maximum bytes of a body that the server gets at a time.

The server holds a copy of what a client has not read yet. The body itself may be shared by many
requests, as that of a page in the cache.
"""


class Endpoint:
    """Answers requests for one operation: reads and logs each, and answers its errors too.

    Attributes:
        operation: The operation.
        gate: Checks the sender of each request; None: the host does.
        requests: The requests of each sender that are being answered.
        route: The operation as a route of Starlette, which answers other methods with 405.
    """

    def __init__(self, operation: Operation, gate: Gate | None, requests: Places) -> None:
        self.operation = operation
        self.gate = gate
        self.requests = requests
        self.route = Route(operation.path, self, methods=[operation.method], name=operation.name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        started = time.perf_counter()
        request = Request(scope, receive, send)
        operation = self.operation
        try:
            # Before anything of the request is read: a stranger learns nothing of its faults.
            actor = await self._admit(scope)
            # A stream has a place of its own, and is never refused by its status.
            sender = None if operation.streams is not None else sender_of(scope)
            if sender is None:
                response = await self._answer(request, actor)
            else:
                with self.requests.place(sender):
                    response = await self._answer(request, actor)
        except Exception as error:  # noqa: BLE001
            stream = None if operation.streams is None else stream_instead(request, error)
            response = stream or problem_response(request, error)
        log_answer(request, operation.path, response, started)
        large = len(response.body) > PART
        await response(scope, receive, _in_parts(send) if large else send)

    async def _answer(self, request: Request, actor: str | None) -> Response:
        """Read a request, and answer it for an actor."""
        arguments = await read_arguments(request, self.operation)
        if actor is None:
            return await self.operation.answer(request, arguments)
        with acting_as(actor[:NAME_MAX_LENGTH]):
            return await self.operation.answer(request, arguments)

    async def _admit(self, scope: Scope) -> str | None:
        """Return the actor of a request; raise unless its sender may send it."""
        if self.gate is None:
            # A user whom a host's middleware has authenticated is the actor.
            user = scope.get("user")
            if user is None or not user.is_authenticated or not user.display_name:
                return None
            name: str = user.display_name
            scope[ACTOR] = name
            return name
        if self.operation.scope is None:
            return None
        return await self.gate.admit(scope, self.operation.scope)


def _in_parts(send: Send) -> Send:
    """Return what sends a large body in parts, each once the client has read enough."""

    async def send_parts(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        body: bytes = message["body"]
        for start in range(0, len(body), PART):
            more = start + PART < len(body)
            await send({**message, "body": body[start : start + PART], "more_body": more})

    return send_parts


class Dispatcher:
    """Answers requests for operations, and passes all other requests on.

    It stands directly before Starlette's router, so that all middleware of a host is in front of
    it. It finds an operation by at most two lookups; the router tries one route after another.

    Args:
        app: Takes all other requests.
        endpoints: The operations.
    """

    def __init__(self, app: ASGIApp, endpoints: Iterable[Endpoint]) -> None:
        self._app = app
        self._endpoints: dict[tuple[str, str], tuple[Endpoint, str]] = {}
        for endpoint in endpoints:
            # Only the last part of a path can be a parameter.
            path, _, parameter = endpoint.operation.path.removesuffix("}").partition("/{")
            for method in endpoint.route.methods or ():
                key = method, f"{path}/" if parameter else path
                self._endpoints[key] = endpoint, parameter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        root_path = scope.get("root_path")
        if root_path:
            paths = route_paths(scope)
            endpoint = next(filter(None, (self._find(scope, path) for path in paths)), None)
            if endpoint is None:
                # The router takes the root path off again.
                scope = {**scope, "path": root_path.rstrip("/") + paths[0]}
        else:
            endpoint = self._find(scope, scope["path"])
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        # For middleware that names requests by their route, as after Starlette's router.
        scope.setdefault("route", endpoint.route)
        scope.setdefault("endpoint", endpoint)
        await endpoint(scope, receive, send)

    def _find(self, scope: Scope, path: str) -> Endpoint | None:
        found = self._endpoints.get((scope["method"], path))
        if found is not None:
            return None if found[1] else found[0]
        parent, slash, last = path.rpartition("/")
        found = self._endpoints.get((scope["method"], parent + slash))
        if found is None or not found[1]:
            return None
        scope["path_params"] = {**scope.get("path_params", {}), found[1]: last}
        return found[0]


def route_paths(scope: Scope) -> list[str]:
    """Return the paths to look up: below the root path, and as given.

    By ASGI, a path begins with the root path. Behind a proxy that strips a prefix, an app may know
    the prefix as its root path although the paths come without it. If the app mounts this one, only
    the mount's part of the root path is in them.
    """
    path: str = scope["path"]
    root_path: str = scope["root_path"].rstrip("/")
    outer: str = scope.get("app_root_path", "").rstrip("/")
    prefixes = [each for each in (root_path, root_path.removeprefix(outer)) if each]
    below = [path[len(each) :] or "/" for each in prefixes if f"{path}/".startswith(f"{each}/")]
    return [*below, path]
