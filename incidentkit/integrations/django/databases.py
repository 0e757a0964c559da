"""The URL of a database in ``DATABASES``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from django.core.exceptions import ImproperlyConfigured

from incidentkit.store.sqlite.url import IN_MEMORY

TLS: Final = ("sslmode", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslpassword")
"""Options of a PostgreSQL connection that the client needs too."""

SHARED: Final = (*TLS, "application_name", "connect_timeout", "options", "passfile", "service")
"""Options to copy into the URL. The others concern only Django's own connections."""


def url_of(alias: str, vendor: str, settings: Mapping[str, Any]) -> str:
    """Return the URL of a database.

    Args:
        alias: Its name in ``DATABASES``, for the error.
        vendor: The ``vendor`` of its connection.
        settings: The ``settings_dict`` of its connection.

    Raises:
        ImproperlyConfigured: If it is neither PostgreSQL nor SQLite.
    """
    name = str(settings["NAME"] or "")
    if vendor == "sqlite":
        if is_in_memory(name):
            return f"sqlite+aiosqlite:///{IN_MEMORY}"
        if name.startswith("file:"):
            # Django opens a name that is an SQLite URI as such.
            file, _, given = name.partition("?")
            return f"sqlite+aiosqlite:///{quote(file)}?{given}{'&' if given else ''}uri=true"
        return f"sqlite+aiosqlite:///{quote(str(Path(name).absolute()))}"
    if vendor != "postgresql":
        raise ImproperlyConfigured(
            f"incidentkit needs PostgreSQL or SQLite, but DATABASES[{alias!r}] is {vendor}"
        )
    options = settings.get("OPTIONS") or {}
    parameters = {key: str(options[key]) for key in SHARED if options.get(key) is not None}
    address, host = "", str(settings.get("HOST") or "")
    if host.startswith("/"):
        parameters["host"] = host
    elif host:
        address = f"[{host}]" if ":" in host else host
    if settings.get("PORT"):
        address += f":{settings['PORT']}"
    account = quote(str(settings.get("USER") or ""), safe="")
    if settings.get("PASSWORD"):
        account += f":{quote(str(settings['PASSWORD']), safe='')}"
    at = "@" if account else ""
    query = f"?{urlencode(parameters, quote_via=quote)}" if parameters else ""
    return f"postgresql://{account}{at}{address}/{quote(name, safe='')}{query}"


def is_in_memory(name: str) -> bool:
    """Return whether an SQLite database is in memory, as in test runs by default."""
    return name in ("", IN_MEMORY) or "mode=memory" in name or name.startswith("file::memory:")
