"""The access tokens of the REST service, without ``await``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from incidentkit.client import IncidentClient
    from incidentkit.domain.tokens import AccessToken, CreatedToken, Scope
    from incidentkit.sync.lifetime import Lifetime


class SyncAccessTokens:
    """Creates, lists and revokes the access tokens of the REST service.

    Each method has the same arguments, result and errors as the method of the same name in
    :class:`~incidentkit.store.AccessTokens`.

    Args:
        client: The asynchronous client with the tokens.
        lifetime: Runs its calls.
    """

    def __init__(self, client: IncidentClient, lifetime: Lifetime) -> None:
        self._client = client
        self._run = lifetime.run

    def create(
        self,
        name: str,
        scopes: Sequence[Scope | str] | Scope | str,
        *,
        expires_in: timedelta | None = None,
    ) -> CreatedToken:
        """Create a token, and return it with its secret, which cannot be shown again."""
        return self._run(self._client.tokens.create(name, scopes, expires_in=expires_in))

    def list(self) -> list[AccessToken]:
        """Return every token, oldest first, including expired and revoked ones."""
        return self._run(self._client.tokens.list())

    def revoke(self, name: str) -> AccessToken:
        """Revoke the active token with a name; a running service refuses it within 5 seconds."""
        return self._run(self._client.tokens.revoke(name))

    def find(self, digest: str) -> tuple[str, AccessToken] | None:
        """Return the stored digest and the token for a digest, or None."""
        return self._run(self._client.tokens.find(digest))

    def mark_used(self, token: AccessToken, now: datetime) -> None:
        """Record that a token was used, unless that was recorded within the last hour."""
        self._run(self._client.tokens.mark_used(token, now))

    def any(self) -> bool:
        """Return whether a token was ever created, active or not."""
        return self._run(self._client.tokens.any())
