"""Create, list, revoke and find access tokens in the table ``incident_access_token``."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from sqlalchemy import Executable, String, bindparam, exists, insert, literal_column, select, update

from incidentkit.domain import rules, tokens
from incidentkit.domain.errors import (
    FieldError,
    InvalidIncident,
    StoreError,
    StoreUnavailable,
    TokenNotFound,
)
from incidentkit.domain.tokens import AccessToken, CreatedToken, NewToken, Scope
from incidentkit.store.executor import Fetch, Rows, Work
from incidentkit.store.sql.rows import UtcDateTime
from incidentkit.store.sql.statements import number_parameter
from incidentkit.store.sql.tables import access_token_table

_T = TypeVar("_T")

logger = logging.getLogger("incidentkit")

USED_EVERY: Final = timedelta(hours=1)
"""Maximum lag of ``last_used_at``, to keep writes rare."""

_tokens = access_token_table.c
_COLUMNS: Final = (
    _tokens.access_token_id,
    _tokens.name,
    _tokens.scopes,
    _tokens.created_at,
    _tokens.expires_at,
    _tokens.revoked_at,
    _tokens.last_used_at,
)
"""The columns of a token, in the order of the fields of :class:`AccessToken`."""


def _time(name: str) -> Any:
    return bindparam(name, type_=UtcDateTime())


def _text(name: str) -> Any:
    return bindparam(name, type_=String())


RETIRE_EXPIRED: Final = (
    update(access_token_table)
    .where(
        _tokens.name == _text("named"),
        _tokens.revoked_at.is_(None),
        _tokens.expires_at <= _time("now"),
    )
    .values(revoked_at=_tokens.expires_at)
)
"""Frees the name of a token that has expired."""

SELECT_ACTIVE: Final = select(_tokens.access_token_id).where(
    _tokens.name == _text("named"), _tokens.revoked_at.is_(None)
)
"""Returns the token that has a name."""

INSERT_TOKEN: Final = (
    insert(access_token_table)
    .values(
        name=_text("name"),
        sha256=_text("sha256"),
        scopes=_text("scopes"),
        created_at=_time("created_at"),
        expires_at=_time("expires_at"),
    )
    .returning(*_COLUMNS)
)
"""Stores a token, and returns it."""

SELECT_TOKENS: Final = select(*_COLUMNS).order_by(_tokens.access_token_id)
"""Returns every token, oldest first."""

REVOKE: Final = (
    update(access_token_table)
    .where(_tokens.name == _text("named"), _tokens.revoked_at.is_(None))
    .values(revoked_at=_time("now"))
    .returning(*_COLUMNS)
)
"""Revokes the token that has a name, and returns it."""

FIND: Final = select(_tokens.sha256, *_COLUMNS).where(_tokens.sha256 == _text("digest"))
"""Returns a token by its digest, after the digest."""

MARK_USED: Final = (
    update(access_token_table)
    .where(_tokens.access_token_id == number_parameter("id"))
    .values(last_used_at=_time("now"))
)
"""Records the last use of a token."""

ANY_TOKEN: Final = select(exists(select(literal_column("1")).select_from(access_token_table)))
"""Returns whether there ever was a token."""


@runtime_checkable
class TokenStore(Protocol):
    """A store whose database has the table of tokens."""

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads."""
        ...

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements in one transaction."""
        ...


class Client(Protocol):
    """An open client, which runs writes to completion.

    Every use raises :class:`~incidentkit.ClientClosed` if it is not open.
    """

    @property
    def store(self) -> object:
        """The store with the incidents and the tokens."""
        ...

    async def write(self, write: Coroutine[Any, Any, _T]) -> _T:
        """Run a write to completion."""
        ...


class AccessTokens:
    """Creates, lists and revokes the access tokens of the REST service.

    Every method raises :class:`~incidentkit.StoreUnavailable` if the database cannot be reached,
    and :class:`~incidentkit.ClientClosed` if the client is not open.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    async def create(
        self,
        name: str,
        scopes: Sequence[Scope | str] | Scope | str,
        *,
        expires_in: timedelta | None = None,
    ) -> CreatedToken:
        """Create a token, and return it with its secret, which cannot be shown again.

        .. code-block:: python

            created = await incidents.tokens.create("ci", ["report", "read"])
            print(created.secret)

        Args:
            name: The actor of its changes: 1 to 64 ASCII letters, digits and ``. _ @ -``, unique
                among active tokens.
            scopes: What it allows, at least one.
            expires_in: The time until it expires, to whole seconds, at most ten years. None: it
                does not expire.

        Raises:
            InvalidIncident: With every faulty argument, or if an active token has this name.
        """
        given: Any = scopes
        new = NewToken(name, given, expires_in)
        secret = tokens.new_secret()
        now = datetime.now(UTC).replace(microsecond=0)
        values = {
            "name": new.name,
            "sha256": tokens.digest(secret),
            "scopes": ",".join(sorted(new.scopes)),
            "created_at": now,
            "expires_at": new.expiry(now),
        }

        async def work(fetch: Fetch) -> AccessToken:
            await fetch(RETIRE_EXPIRED, {"named": new.name, "now": now})
            if await fetch(SELECT_ACTIVE, {"named": new.name}):
                raise _taken()
            return _read((await fetch(INSERT_TOKEN, values))[0])

        store = self._store()
        try:
            token = await self._client.write(store.transact(work))
        except StoreUnavailable:
            raise
        except StoreError as error:
            # Another process may have created a token with this name at the same time.
            if await store.fetch(SELECT_ACTIVE, {"named": new.name}):
                raise _taken() from error
            raise
        scoped = ", ".join(sorted(token.scopes))
        logger.info("Token %d created: %s (%s)", token.access_token_id, token.name, scoped)
        return CreatedToken(secret, token)

    async def list(self) -> list[AccessToken]:
        """Return every token, oldest first, also those that have expired or were revoked."""
        return [_read(row) for row in await self._store().fetch(SELECT_TOKENS, {})]

    async def revoke(self, name: str) -> AccessToken:
        """Revoke the active token with a name; a running service refuses it within 5 seconds.

        Raises:
            TokenNotFound: If no active token has this name.
            InvalidIncident: If it is not a name.
        """
        rules.check("name", tokens.token_name, name)
        now = datetime.now(UTC).replace(microsecond=0)

        async def work(fetch: Fetch) -> AccessToken:
            await fetch(RETIRE_EXPIRED, {"named": name, "now": now})
            rows = await fetch(REVOKE, {"named": name, "now": now})
            if not rows:
                raise TokenNotFound(name)
            return _read(rows[0])

        token = await self._client.write(self._store().transact(work))
        logger.info("Token %d revoked: %s", token.access_token_id, token.name)
        return token

    async def find(self, digest: str) -> tuple[str, AccessToken] | None:
        """Return the stored digest and the token for a digest, or None."""
        rows = await self._store().fetch(FIND, {"digest": digest})
        return (rows[0][0], _read(rows[0][1:])) if rows else None

    async def mark_used(self, token: AccessToken, now: datetime) -> None:
        """Record that a token was used, unless that was recorded within the last hour."""
        if token.last_used_at is not None and now - token.last_used_at < USED_EVERY:
            return
        values = {"id": token.access_token_id, "now": now.replace(microsecond=0)}

        async def work(fetch: Fetch) -> None:
            await fetch(MARK_USED, values)

        await self._client.write(self._store().transact(work))

    async def any(self) -> bool:
        """Return whether there ever was a token, active or not."""
        return bool((await self._store().fetch(ANY_TOKEN, {}))[0][0])

    def _store(self) -> TokenStore:
        store = self._client.store
        if not isinstance(store, TokenStore):
            raise StoreError(
                "the client's store keeps no access tokens: use a store for PostgreSQL or SQLite"
            )
        return store


def _taken() -> InvalidIncident:
    reason = "belongs to an active token: revoke it first, or choose another name"
    return InvalidIncident([FieldError("name", reason)])


def _read(row: Sequence[Any]) -> AccessToken:
    """Return the token of a row, without the scopes of newer versions."""
    known = {scope.value: scope for scope in Scope}
    access_token_id, name, scopes, *times = row
    found = frozenset(known[each] for each in scopes.split(",") if each in known)
    return AccessToken(access_token_id, name, found, *times)
