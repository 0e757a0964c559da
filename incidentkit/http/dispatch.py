"""From a request to the operation that answers it, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from incidentkit.domain.actor import acting_as
from incidentkit.domain.values import NAME_MAX_LENGTH
from incidentkit.http.log import log_route
from incidentkit.http.request_id import NAME, request_id
from incidentkit.http.requests import read_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from incidentkit.http.routes import Operation


class Endpoint:
    """Answers the requests for an operation."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self._answer = log_route(operation.path)(self._read_and_answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one."""
        response = await self._answer(Request(scope, receive, send))
        response.raw_headers.append((NAME, request_id(scope).encode()))
        await response(scope, receive, send)

    async def _read_and_answer(self, request: Request) -> Response:
        arguments = await read_arguments(request, self.operation)
        # A user that a host's middleware has authenticated is the actor.
        user = request.scope.get("user")
        if user is None or not user.is_authenticated or not user.display_name:
            return await self.operation.answer(request, arguments)
        with acting_as(user.display_name[:NAME_MAX_LENGTH]):
            return await self.operation.answer(request, arguments)


class Service(Starlette):
    """An app that looks its operations up by name, where Starlette would try one after another.

    What is none of them, and all that a host's middleware has to see, goes Starlette's own way.
    """

    def __init__(self, operations: Iterable[Operation], **options: Any) -> None:
        endpoints = [Endpoint(operation) for operation in operations]
        super().__init__(routes=[_route(endpoint) for endpoint in endpoints], **options)
        self.router.redirect_slashes = False
        self._own_middleware = len(self.user_middleware)
        self._endpoints: dict[tuple[str, str], tuple[Endpoint, str]] = {}
        for endpoint in endpoints:
            # A parameter can only be the last part of a path.
            path, _, parameter = endpoint.operation.path.removesuffix("}").partition("/{")
            for method in _methods(endpoint.operation):
                key = method, f"{path}/" if parameter else path
                self._endpoints[key] = endpoint, parameter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and len(self.user_middleware) == self._own_middleware:
            endpoint = self._find(scope)
            if endpoint is not None:
                scope["app"] = self
                await endpoint(scope, receive, send)
                return
        await super().__call__(scope, receive, send)

    def _find(self, scope: Scope) -> Endpoint | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        found = self._endpoints.get((scope["method"], path))
        if found is not None:
            return None if found[1] else found[0]
        parent, slash, last = path.rpartition("/")
        found = self._endpoints.get((scope["method"], parent + slash))
        if found is None:
            return None
        scope["path_params"] = {found[1]: last}
        return found[0]


def _route(endpoint: Endpoint) -> Route:
    operation = endpoint.operation
    return Route(operation.path, endpoint, methods=[operation.method], name=operation.name)


def _methods(operation: Operation) -> tuple[str, ...]:
    return ("GET", "HEAD") if operation.method == "GET" else (operation.method,)
