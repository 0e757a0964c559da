"""Check the URL of a service, and the token that is sent to it."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Final
from urllib.parse import SplitResult, urlsplit

from incidentkit.domain.errors import InvalidSettings

_SCHEMES: Final = ("http", "https")
_TOKEN: Final = re.compile(r"[!-~]{1,4096}", re.ASCII)
_PATH: Final = re.compile(r"[!-~]*", re.ASCII)


def service_url(url: str) -> str:
    """Return the URL of a service without a slash at its end.

    Raises:
        InvalidSettings: If it is not the URL of a service.
    """
    parts = _parts(url)
    if parts.username is not None or parts.password is not None:
        raise InvalidSettings("database", "must not have a user or a password: pass token=")
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise InvalidSettings("database", "must not have a query or a fragment")
    if not parts.hostname or _PATH.fullmatch(parts.netloc + parts.path) is None:
        raise _invalid()
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def check_token(url: str, token: str | None, *, plain_http: bool) -> None:
    """Raise unless a token can be sent to a service.

    Args:
        url: The URL of the service.
        token: The token; None: none is sent.
        plain_http: Whether it may be sent to another host without TLS.

    Raises:
        InvalidSettings: If the token cannot be sent in a header, or others could read it.
    """
    if token is None:
        return
    given: object = token
    if not isinstance(given, str) or _TOKEN.fullmatch(given) is None:
        raise InvalidSettings("token", "must have 1 to 4096 visible ASCII characters")
    parts = _parts(url)
    if parts.scheme == "http" and not plain_http and not _is_loopback(parts.hostname or ""):
        raise InvalidSettings(
            "token",
            "would be sent unencrypted: use https://, or RemoteOptions(plain_http=True) in a "
            "network that you trust",
        )


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme in _SCHEMES and parts.port != 0:
            return parts
    except ValueError:
        # The text of this exception contains the URL.
        pass
    raise _invalid()


def _invalid() -> InvalidSettings:
    return InvalidSettings("database", "must be the URL of a service, such as https://host/prefix")


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
