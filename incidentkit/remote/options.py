"""Time limits and connections for the client of a service."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from ssl import SSLContext
from typing import TYPE_CHECKING, Any, Final

from attrs import Attribute, field, frozen

from incidentkit.domain.errors import InvalidSettings
from incidentkit.domain.values import MAX_PER_TOKEN

if TYPE_CHECKING:
    from httpx2 import AsyncBaseTransport  # an extra

MAX_SECONDS: Final = 3600
MAX_ATTEMPTS: Final = 100


def _seconds(_: object, option: Attribute[float], value: object) -> None:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0
    if not (isfinite(number) and 0 < number <= MAX_SECONDS):
        reason = f"must be a number of seconds above 0, at most {MAX_SECONDS}"
        raise InvalidSettings(f"remote.{option.name}", reason)


def _integer(maximum: int) -> Any:
    def check(_: object, option: Attribute[int], value: object) -> None:
        valid = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= maximum
        if not valid:
            reason = f"must be an integer from 1 to {maximum}"
            raise InvalidSettings(f"remote.{option.name}", reason)

    return check


def _flag(_: object, option: Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidSettings(f"remote.{option.name}", "must be True or False")


def _context(_: object, option: Attribute[SSLContext | None], value: object) -> None:
    if not (value is None or isinstance(value, SSLContext)):
        raise InvalidSettings(f"remote.{option.name}", "must be an ssl.SSLContext or None")


def _transport(_: object, option: Attribute[Any], value: object) -> None:
    if not (value is None or hasattr(value, "handle_async_request")):
        reason = "must be an asynchronous transport of httpx2 or None"
        raise InvalidSettings(f"remote.{option.name}", reason)


def _headers(_: object, option: Attribute[Any], value: object) -> None:
    texts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else [None]
    if not all(isinstance(each, str) and each.isascii() and each.isprintable() for each in texts):
        reason = "must be a mapping of names to values, in printable ASCII"
        raise InvalidSettings(f"remote.{option.name}", reason)


@frozen(kw_only=True)
class RemoteOptions:
    """Time limits and connections for the client of a service.

    The other options of a client, such as its cache, belong to the service.

    Attributes:
        deadline: Seconds that a call may take with all its attempts, above 0, at most 3600. A call
            that waits for changes may also take the time that it waits, and each request of a purge
            another 30 seconds.
        connect_timeout: Seconds to wait for a new connection, within the deadline.
        read_timeout: Seconds of silence after which an attempt fails, within the deadline.
        attempts: Number of attempts, 1 to 100, within the deadline: a request is repeated if the
            connection fails, or the service is unavailable or has too many requests.
        max_connections: Requests at a time, 1 to 10,000. By default, a service answers 20 requests
            of one token at a time, including those of ``max_readers``.
        max_readers: Calls that wait for changes at a time, 1 to 10,000; others take turns. A
            service allows 10 of one token by default.
        max_searches: Searches with ``text``, ``total`` or ``details`` at a time, 1 to
            10,000, of ``max_connections``. A service allows 2 of one token by default.
        ssl_context: For certificates from a private authority, or for a client certificate. None:
            trust the authorities that httpx2 trusts.
        plain_http: Whether a token may be sent over ``http://`` to another host.
        headers: Additional headers of each request, such as those that a proxy requires.
        transport: A transport of httpx2 to send requests with, such as ``ASGITransport`` in tests;
            closed with the client. None: connections that the client opens.

    Raises:
        InvalidSettings: With the name of the faulty option.
    """

    deadline: float = field(default=10.0, validator=_seconds)
    connect_timeout: float = field(default=3.0, validator=_seconds)
    read_timeout: float = field(default=5.0, validator=_seconds)
    attempts: int = field(default=3, validator=_integer(MAX_ATTEMPTS))
    max_connections: int = field(default=10, validator=_integer(MAX_PER_TOKEN))
    max_readers: int = field(default=5, validator=_integer(MAX_PER_TOKEN))
    max_searches: int = field(default=2, validator=_integer(MAX_PER_TOKEN))
    ssl_context: SSLContext | None = field(default=None, validator=_context, repr=False)
    plain_http: bool = field(default=False, validator=_flag)
    headers: Mapping[str, str] = field(factory=dict, validator=_headers, repr=False, hash=False)
    transport: AsyncBaseTransport | None = field(default=None, validator=_transport, repr=False)
