"""Sizes and time limits of a store."""

from __future__ import annotations

from typing import Final

from attrs import Attribute, field, frozen

from incidentkit.domain.errors import InvalidSettings

PREPARED_STATEMENTS: Final[dict[str, bool | None]] = {"auto": None, "on": True, "off": False}
"""The values of ``prepared_statements`` in the environment, in a URL and on the command line."""


def _at_least(low: int, option: Attribute[int], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InvalidSettings(option.name, f"must be an integer from {low}")


def _from_zero(_: object, option: Attribute[int], value: object) -> None:
    _at_least(0, option, value)


def _from_one(_: object, option: Attribute[int], value: object) -> None:
    _at_least(1, option, value)


def _positive(_: object, option: Attribute[float], value: object) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InvalidSettings(option.name, "must be a positive number of seconds")


def _optional_flag(_: object, option: Attribute[bool | None], value: object) -> None:
    if not (value is None or isinstance(value, bool)):
        raise InvalidSettings(option.name, "must be True, False or None")


@frozen
class StoreOptions:
    """How a store uses its database.

    Attributes:
        pool_size: Connections that stay open, at least 1; on PostgreSQL, until they have not been
            used for five minutes. On SQLite: connections for reading, and half as many more for
            slow reads.
        max_overflow: Further connections under load, at least 0; ignored on SQLite.
        connect_timeout: Seconds to wait for a new connection.
        pool_timeout: Seconds to wait for a free connection.
        statement_timeout: Seconds that a statement may take. On SQLite: seconds that a slow read,
            such as a search, a total or a deep page, may take, and seconds to wait for another
            process that is writing. There, any other read, and a write that has not begun, fails
            after the sum of ``pool_timeout`` and ``statement_timeout``.
        prepared_statements: Whether statements stay prepared on PostgreSQL, which saves each one a
            round trip. None: as the URL says; if it says nothing, unless there is a connection
            pooler. For a host's engine or pool, which decides that itself, pass True if its
            pooler supports prepared statements, or is in session mode; False changes nothing.
            Ignored on SQLite.
        echo: Log every statement, without its values, to the logger ``incidentkit.store``.

    Raises:
        InvalidSettings: With the name of the faulty option.
    """

    pool_size: int = field(default=5, validator=_from_one)
    max_overflow: int = field(default=10, validator=_from_zero)
    connect_timeout: float = field(default=5.0, validator=_positive)
    pool_timeout: float = field(default=5.0, validator=_positive)
    statement_timeout: float = field(default=10.0, validator=_positive)
    prepared_statements: bool | None = field(default=None, validator=_optional_flag)
    echo: bool = False
