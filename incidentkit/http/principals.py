"""Authenticate and authorize each request before its operation runs.

An app without ``authenticate`` does neither: the application that mounts it does.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from attrs import frozen
from starlette.types import Scope

from incidentkit.domain import rules
from incidentkit.domain.errors import (
    ClientClosed,
    FieldError,
    InvalidIncident,
    SchemaOutOfDate,
    StoreUnavailable,
)
from incidentkit.domain.tokens import Scope as TokenScope
from incidentkit.domain.values import NAME_MAX_LENGTH
from incidentkit.http.problems import RETRY_HEADERS, Refusal
from incidentkit.http.request_id import request_id
from incidentkit.wire.kinds import Kind

logger = logging.getLogger("incidentkit.http")

PRINCIPAL: Final = "incidentkit.principal"
"""The key of the principal in the scope of a request, once it is checked."""

ACTOR: Final = "incidentkit.actor"
"""The key of the actor in the scope of a request; it is missing if there is none."""

STRANGER: Final = "incidentkit.stranger"
"""The key in the scope of a request whose sender learns no details, whatever it may do."""

ACTOR_HEADER: Final = "X-Actor"

CHALLENGE: Final = 'Bearer realm="incidentkit"'

_AUTHORIZATION: Final = b"authorization"
_X_ACTOR: Final = ACTOR_HEADER.lower().encode()


@frozen
class Principal:
    """The sender of a request.

    Attributes:
        name: The actor of its changes; empty for an anonymous caller.
        scopes: What it may do.
    """

    name: str
    scopes: frozenset[TokenScope]


Authenticate: TypeAlias = Callable[[Scope], Awaitable[Principal | None]]
"""Returns the sender of a request by its ASGI scope; None if it is unknown, which is answered with
401. Any exception is logged and answered with 503."""


@runtime_checkable
class HasSchemes(Protocol):
    """An ``authenticate`` that can describe itself.

    Attributes:
        schemes: The security schemes of the OpenAPI document, by name.
    """

    schemes: Mapping[str, Mapping[str, Any]]


READ: Final = frozenset((TokenScope.READ,))


def sender_of(scope: Scope) -> str | None:
    """Return the name of the checked sender of a request; None if it is anonymous or unknown."""
    principal: Principal | None = scope.get(PRINCIPAL)
    return None if principal is None else principal.name or None


def sees_details(scope: Scope) -> bool:
    """Return whether the sender of a request may see what others have reported."""
    principal: Principal | None = scope.get(PRINCIPAL)
    return principal is None or not _SEEING.isdisjoint(principal.scopes)


_SEEING: Final = READ | {TokenScope.WRITE}


async def still_admitted(scope: Scope) -> bool:
    """Return whether the sender of a long request may go on with it."""
    gate: Gate | None = scope["app"].gate
    return gate is None or await gate.still_admits(scope)


async def check_again(scope: Scope) -> None:
    """Raise unless the sender of a long request may go on with it.

    Raises:
        Refusal: If its token was revoked or has expired meanwhile.
    """
    if not await still_admitted(scope):
        raise unauthenticated(scope)


class Gate:
    """Admits a request if its sender has one of the scopes of the operation.

    Args:
        authenticate: Finds the sender.
    """

    def __init__(self, authenticate: Authenticate) -> None:
        self._authenticate = authenticate

    @property
    def schemes(self) -> Mapping[str, Mapping[str, Any]]:
        """The security schemes of the OpenAPI document, by name; empty if they are unknown."""
        described: object = self._authenticate
        return described.schemes if isinstance(described, HasSchemes) else {}

    async def admit(self, scope: Scope, needed: frozenset[TokenScope]) -> str | None:
        """Put the sender into the scope of a request, and return the actor of its changes.

        Args:
            scope: The request.
            needed: One of these scopes is enough.

        Returns:
            The actor; None for an anonymous caller.

        Raises:
            Refusal: 401 if the sender is unknown or needs a token, 403 if it has none of the scopes
                or may not name an actor, 503 if the check fails.
            StoreUnavailable: If the check needs the database, which cannot be reached.
            InvalidIncident: If the header ``X-Actor`` has no valid name.
        """
        principal = await self._check(scope)
        if principal is None:
            raise unauthenticated(scope)
        if needed.isdisjoint(principal.scopes):
            # A client that was not asked for a token may have one.
            raise _insufficient(needed) if principal.name else unauthenticated(scope)
        scope[PRINCIPAL] = principal
        actor = _actor(scope, principal)
        if actor is not None:
            scope[ACTOR] = actor
        return actor

    async def knows(self, scope: Scope, needed: frozenset[TokenScope]) -> bool:
        """Return whether the sender has one of the scopes now; an error counts as no.

        Operations that need no token show more to such a sender.
        """
        if STRANGER in scope:
            return False
        try:
            principal = await self._check(scope)
        except (Refusal, StoreUnavailable, SchemaOutOfDate, ClientClosed):
            return False
        return principal is not None and not needed.isdisjoint(principal.scopes)

    async def still_admits(self, scope: Scope) -> bool:
        """Return whether the sender of a long request still has the same name and scopes.

        While the database is unavailable, this is assumed.
        """
        admitted: Principal | None = scope.get(PRINCIPAL)
        try:
            principal = await self._check(scope)
        except Refusal as refusal:
            return refusal.kind is Kind.AUTHENTICATION_UNAVAILABLE
        except (StoreUnavailable, SchemaOutOfDate, ClientClosed):
            return True
        return principal == admitted

    async def _check(self, scope: Scope) -> Principal | None:
        try:
            return await self._authenticate(scope)
        except (Refusal, StoreUnavailable, SchemaOutOfDate, ClientClosed):
            raise
        except Exception as error:
            logger.exception(
                "The authentication check of a request raised an exception",
                extra={"request_id": request_id(scope)},
            )
            detail = "The service cannot authenticate requests at present: try again later"
            raise Refusal(Kind.AUTHENTICATION_UNAVAILABLE, detail, headers=RETRY_HEADERS) from error


def unauthenticated(scope: Scope) -> Refusal:
    """Return the refusal of an unknown sender, the same for every invalid token."""
    sent = any(name == _AUTHORIZATION for name, _ in scope["headers"])
    challenge = f'{CHALLENGE}, error="invalid_token"' if sent else CHALLENGE
    detail = "This operation needs a valid access token"
    return Refusal(Kind.UNAUTHENTICATED, detail, headers={"WWW-Authenticate": challenge})


def _insufficient(needed: Iterable[TokenScope]) -> Refusal:
    names = sorted(needed)
    scopes = " ".join(names)
    challenge = f'{CHALLENGE}, error="insufficient_scope", scope="{scopes}"'
    detail = f"This operation needs a token with the scope {' or '.join(names)}"
    return Refusal(Kind.INSUFFICIENT_SCOPE, detail, headers={"WWW-Authenticate": challenge})


def _actor(scope: Scope, principal: Principal) -> str | None:
    """Return the principal as the actor, followed by the name in ``X-Actor`` if there is one."""
    given = [value for name, value in scope["headers"] if name == _X_ACTOR]
    if not given:
        return principal.name or None
    if TokenScope.ACT_AS not in principal.scopes:
        detail = f"Only a token with the scope {TokenScope.ACT_AS} may send {ACTOR_HEADER}"
        raise Refusal(Kind.ACTOR_NOT_ALLOWED, detail)
    return f"{principal.name}/{_named(given, NAME_MAX_LENGTH - len(principal.name) - 1)}"


def _named(given: list[bytes], maximum: int) -> str:
    reason = f"({ACTOR_HEADER}) must be given once, with 1 to {maximum} printable characters"
    try:
        (value,) = given
        name = rules.name(value.strip(b" \t").decode())
        if len(name) <= maximum and name.isprintable():
            return name
    except ValueError:
        # Also one that is not UTF-8, and one of several headers.
        pass
    raise InvalidIncident([FieldError("actor", reason)])
