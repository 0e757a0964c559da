"""Authenticate requests by the access tokens in the client's database.

::

    from incidentkit.http import create_app
    from incidentkit.http.authentication import TokenAuth

    incidents = IncidentClient.from_env()
    app = create_app(incidents, authenticate=TokenAuth(incidents))
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64decode
from binascii import Error
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from hmac import compare_digest
from ipaddress import IPv6Address, ip_network
from math import ceil
from typing import Any, Final, Literal, TypeAlias

from attrs import define, field
from starlette.types import Scope

from incidentkit.batching import Coalescer
from incidentkit.client import IncidentClient
from incidentkit.domain import tokens
from incidentkit.domain.errors import IncidentKitError
from incidentkit.domain.tokens import AccessToken
from incidentkit.domain.tokens import Scope as TokenScope
from incidentkit.http.client_address import client_address, read_address
from incidentkit.http.principals import Principal
from incidentkit.http.problems import Refusal
from incidentkit.wire.kinds import Kind

Anonymous: TypeAlias = Literal["never", "until_token", "always"]
"""When requests without a token are answered: never, until the database has a first token, or
always."""

MAX_AGE: Final = 5.0
"""Seconds for which a successful check is cached: a revoked token works for no longer."""

MAX_KNOWN: Final = 1000
"""Maximum number of successful checks in the cache."""

MAX_FAILURES: Final = 20
"""Maximum number of failed checks of one address in a minute."""

WINDOW: Final = 60.0
"""Seconds in which :data:`MAX_FAILURES` are counted."""

MAX_ADDRESSES: Final = 10_000
"""Maximum number of addresses whose failed checks are counted."""

ANONYMOUS: Final = Principal("", frozenset((TokenScope.REPORT, TokenScope.READ, TokenScope.WRITE)))
"""An anonymous caller: it may do everything except purge and name an actor."""

_AUTHORIZATION: Final = b"authorization"


@define
class _Known:
    """A successful check.

    Attributes:
        principal: The owner of the token.
        expires: When the token expires, in seconds since 1970; None: it does not.
        until: When the check has to be repeated, by ``time.monotonic()``.
    """

    principal: Principal
    expires: float | None
    until: float


@define
class _Failures:
    """The failed checks of one address since a time."""

    since: float
    count: int = field(default=0)


class TokenAuth:
    """Authenticates requests by access token; pass it to ``create_app`` as ``authenticate``.

    The token is sent as ``Authorization: Bearer``, or as the password of ``Basic``.

    Args:
        client: Its database has the tokens.
        anonymous: When requests without a token are answered. Once the database has had a token,
            ``until_token`` means never.
        max_age: Seconds, 0 to 5, for which a successful check is cached.
    """

    schemes: Mapping[str, Mapping[str, Any]] = {
        "bearer": {
            "type": "http",
            "scheme": "bearer",
            "description": "An access token, such as `incidentkit token create` prints.",
        },
        "basic": {
            "type": "http",
            "scheme": "basic",
            "description": "An access token as the password, with any user name.",
        },
    }

    def __init__(
        self,
        client: IncidentClient,
        *,
        anonymous: Anonymous = "never",
        max_age: float = MAX_AGE,
    ) -> None:
        self._client = client
        self._anonymous = anonymous
        self._max_age = min(max(max_age, 0.0), MAX_AGE)
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._failures: OrderedDict[str, _Failures] = OrderedDict()
        self._look_up = Coalescer(self._find)
        self._asks_for_tokens = Coalescer(self._ask_for_tokens)
        self._no_token_until = 0.0
        self._marking: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope) -> Principal | None:
        """Return the sender of a request, or None if it has no valid token.

        Raises:
            Refusal: 429 if too many checks of the client's address have failed.
            StoreUnavailable: If the database cannot be reached and no check of the token is
                cached.
        """
        sent = [value for name, value in scope["headers"] if name == _AUTHORIZATION]
        if not sent:
            return ANONYMOUS if await self._allows_anonymous() else None
        secret = _secret(sent)
        digest = sha256(secret).digest()
        known = self._known.get(digest)
        if known is not None and not _lasts(known):
            # No need for the database, which may be unavailable.
            return None
        if known is not None and time.monotonic() < known.until:
            return known.principal
        return await self._check(scope, secret, digest, known)

    async def _check(
        self, scope: Scope, secret: bytes, digest: bytes, known: _Known | None
    ) -> Principal | None:
        """Look up a well-formed token, unless too many checks of the address have failed."""
        address = _counted(client_address(scope))
        if known is None:
            # A token that was valid is always looked up: an attacker may share its address.
            self._refuse_too_many(address)
        well_formed = secret.isascii() and tokens.is_token(secret.decode())
        found = await self._look_up(digest) if well_formed else None
        if found is None:
            self._known.pop(digest, None)
            self._count_failure(address)
        return found

    async def _find(self, digest: bytes) -> Principal | None:
        """Return the principal of an active token by its digest, and remember it."""
        asked_at = time.monotonic()
        found = await self._client.tokens.find(digest.hex())
        if found is None or not compare_digest(found[0], digest.hex()):
            return None
        token, now = found[1], datetime.now(UTC)
        if not token.active(now):
            return None
        self._close_to_anonymous()
        known = _Known(
            Principal(token.name, token.scopes),
            None if token.expires_at is None else token.expires_at.timestamp(),
            asked_at + self._max_age,
        )
        self._known[digest] = known
        self._known.move_to_end(digest)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        self._mark_used(token, now)
        return known.principal

    def _mark_used(self, token: AccessToken, now: datetime) -> None:
        """Record the use of the token; no request waits for it."""
        marking = asyncio.ensure_future(_ignoring_errors(self._client, token, now))
        self._marking.add(marking)
        marking.add_done_callback(self._marking.discard)

    async def _allows_anonymous(self) -> bool:
        if self._anonymous == "until_token":
            if time.monotonic() < self._no_token_until:
                return True
            await self._asks_for_tokens(None)
        return self._anonymous != "never"

    async def _ask_for_tokens(self, _: None) -> None:
        asked_at = time.monotonic()
        if await self._client.tokens.any():
            self._close_to_anonymous()
        self._no_token_until = asked_at + self._max_age

    def _close_to_anonymous(self) -> None:
        """Refuse anonymous callers from now on, until the process ends."""
        if self._anonymous == "until_token":
            self._anonymous = "never"

    def _refuse_too_many(self, address: str) -> None:
        failures = self._failures.get(address)
        if failures is None:
            return
        left = failures.since + WINDOW - time.monotonic()
        if left <= 0:
            del self._failures[address]
        elif failures.count >= MAX_FAILURES:
            detail = "Too many invalid access tokens came from this address: try again later"
            headers = {"Retry-After": str(ceil(left))}
            raise Refusal(Kind.TOO_MANY_FAILED_CHECKS, detail, headers=headers)

    def _count_failure(self, address: str) -> None:
        now = time.monotonic()
        failures = self._failures.get(address)
        if failures is None or now >= failures.since + WINDOW:
            failures = self._failures[address] = _Failures(now)
        failures.count += 1
        self._failures.move_to_end(address)
        if len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)


async def _ignoring_errors(client: IncidentClient, token: AccessToken, now: datetime) -> None:
    try:
        await client.tokens.mark_used(token, now)
    except IncidentKitError:
        # The account may only read, for example; the next uncached check tries again.
        return


def _lasts(known: _Known) -> bool:
    return known.expires is None or time.time() < known.expires


def _bearer(credentials: bytes) -> bytes:
    return credentials


def _basic(credentials: bytes) -> bytes:
    """Return the password, and ignore the user."""
    try:
        return b64decode(credentials, validate=True).partition(b":")[2]
    except Error:
        return b""


_SCHEMES: Final[Mapping[bytes, Callable[[bytes], bytes]]] = {b"bearer": _bearer, b"basic": _basic}
"""How the token is read, by the scheme of the header."""


def _secret(sent: list[bytes]) -> bytes:
    """Return the token of a request; empty if there are several, or it is of another scheme."""
    scheme, _, credentials = sent[0].partition(b" ")
    read = _SCHEMES.get(scheme.lower())
    return b"" if read is None or len(sent) > 1 else read(credentials.strip())


def _counted(address: str | None) -> str:
    """Return the key under which failures of an address count: with IPv6, its network."""
    read = None if address is None else read_address(address)
    if isinstance(read, IPv6Address):
        return str(ip_network((read, 64), strict=False))
    return address or ""
