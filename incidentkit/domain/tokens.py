"""Define the format, the scopes and the fields of access tokens."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import Final
from zlib import crc32

from attrs import field, frozen

from incidentkit.domain import rules
from incidentkit.domain.values import LATEST_TIME

PREFIX: Final = "ik_"
"""The prefix of every token, by which secret scanners find leaked ones."""

SECRET_LENGTH: Final = 43
"""Number of random characters: 256 bits."""

CHECKSUM_LENGTH: Final = 6
"""Number of characters of the CRC32."""

ALPHABET: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
"""The 62 digits of a token."""

NAME_LENGTH: Final = 64
"""Maximum number of characters in the name of a token."""

MAX_LIFETIME: Final = timedelta(days=3650)
"""The longest time until a token expires."""

_TOKEN: Final = re.compile(
    rf"(?P<body>{PREFIX}[0-9A-Za-z]{{{SECRET_LENGTH}}})(?P<checksum>[0-9A-Za-z]{{{CHECKSUM_LENGTH}}})",
    re.ASCII,
)
_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._@-]{{0,{NAME_LENGTH - 1}}}", re.ASCII)


class Scope(StrEnum):
    """What a token allows; no scope includes another."""

    REPORT = "report"
    READ = "read"
    WRITE = "write"
    ADMIN = "admin"
    ACT_AS = "act-as"


@frozen
class AccessToken:
    """A token as it is stored, without its secret.

    Attributes:
        access_token_id: Its id.
        name: The actor of its changes.
        scopes: What it allows.
        created_at: When it was created, in UTC.
        expires_at: The time from which it is refused, in UTC; None: it does not expire.
        revoked_at: When it was revoked, in UTC; None: it was not.
        last_used_at: When it was last used, in UTC, to the hour; None: never.
    """

    access_token_id: int
    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    def active(self, now: datetime) -> bool:
        """Return whether the token is valid at a time."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@frozen
class CreatedToken:
    """A new token with its secret, which is shown nowhere else.

    Attributes:
        secret: The token to send; it is never in a ``repr`` or in a database.
        token: The token as it is stored.
    """

    secret: str = field(repr=False)
    token: AccessToken


def new_secret() -> str:
    """Return a new random token: ``ik_``, 43 random characters and 6 of their CRC32."""
    body = PREFIX + "".join(secrets.choice(ALPHABET) for _ in range(SECRET_LENGTH))
    return body + _checksum(body)


def is_token(text: str) -> bool:
    """Return whether a text has the format of a token and the right checksum."""
    found = _TOKEN.fullmatch(text)
    return found is not None and found["checksum"] == _checksum(found["body"])


def digest(secret: str) -> str:
    """Return the SHA-256 of a token in hexadecimal digits, which the database stores.

    A token has 256 random bits, so a salt or a slow hash would add nothing.
    """
    return sha256(secret.encode()).hexdigest()


def _checksum(body: str) -> str:
    number, digits = crc32(body.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits


def token_name(value: str) -> str:
    """Return the name of a token, which is also an actor."""
    return _token_name(value)


def _token_name(value: object) -> str:
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise ValueError(
            f"must have 1 to {NAME_LENGTH} characters: ASCII letters and digits, and after the "
            "first one also . _ @ -"
        )
    return value


def scopes(value: Iterable[Scope | str] | Scope | str) -> frozenset[Scope]:
    """Return one scope or several as a set."""
    return _scopes(value)


def _scopes(value: object) -> frozenset[Scope]:
    several = isinstance(value, Iterable) and not isinstance(value, str)
    given = frozenset(value) if several and isinstance(value, Iterable) else frozenset([value])
    found = frozenset(scope for scope in Scope if scope in given)
    if not found or len(found) < len(given):
        raise ValueError(f"must be one or several of: {', '.join(Scope)}")
    return found


def lifetime(value: timedelta | None) -> timedelta | None:
    """Return the time until a token expires, one second to ten years; None: it does not expire."""
    return None if value is None else _lifetime(value)


def _lifetime(value: object) -> timedelta:
    if not isinstance(value, timedelta) or not timedelta(seconds=1) <= value <= MAX_LIFETIME:
        raise ValueError(
            f"must be a timedelta from one second to {MAX_LIFETIME.days} days, or None"
        )
    return value


@frozen(field_transformer=rules.collect)
class NewToken:
    """A token to create.

    Attributes:
        name: Its name, 1 to 64 characters.
        scopes: What it allows, at least one.
        expires_in: The time until it expires, to whole seconds; None: it does not expire.
    """

    name: str = field(converter=token_name)
    scopes: frozenset[Scope] = field(converter=scopes)
    expires_in: timedelta | None = field(default=None, converter=lifetime)

    __attrs_post_init__ = rules.raise_faults

    def expiry(self, now: datetime) -> datetime | None:
        """Return when the token expires if it is created at a time."""
        if self.expires_in is None:
            return None
        return min(now + self.expires_in, LATEST_TIME).replace(microsecond=0)
