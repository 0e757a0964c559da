"""SQL expressions that compile differently for each database."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from sqlalchemy import BigInteger, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement

from incidentkit.store.sql.naming import in_schema
from incidentkit.store.sql.rows import UtcDateTime


class current_second(FunctionElement[datetime]):  # noqa: N801
    """The time by the database's clock when a row is written, in whole seconds."""

    type = UtcDateTime()
    inherit_cache = True


@compiles(current_second)
def _current_second(*_: Any, **__: Any) -> str:
    # Not now(), which stands still during a host's transaction.
    return "date_trunc('second', clock_timestamp())"


@compiles(current_second, "sqlite")
def _current_second_sqlite(*_: Any, **__: Any) -> str:
    return "CURRENT_TIMESTAMP"


class a_day_ago(FunctionElement[datetime]):  # noqa: N801
    """The time 24 hours ago by the database's clock."""

    type = UtcDateTime()
    inherit_cache = True


@compiles(a_day_ago)
def _a_day_ago(*_: Any, **__: Any) -> str:
    return "(clock_timestamp() - interval '24 hours')"


@compiles(a_day_ago, "sqlite")
def _a_day_ago_sqlite(*_: Any, **__: Any) -> str:
    return "datetime('now', '-24 hours')"


class current_token(FunctionElement[str]):  # noqa: N801
    """The token of the incidents in the statement's snapshot; null if it is unknown."""

    type = Text()
    inherit_cache = True


TOKEN_ON_POSTGRESQL: Final = """(
    SELECT CASE WHEN count(*) FILTER (WHERE slot < 16) = 16 THEN
        encode(sha256(string_agg(uuid_send(token), CAST('' AS bytea) ORDER BY slot)), 'hex')
    END
    FROM incident_token
)"""
"""The token as text, for statements that are written as text. It is null if a row is missing, as
after the table was emptied by hand: the token of fewer rows could come back."""


@compiles(current_token)
def _current_token(_: Any, compiler: SQLCompiler, **__: Any) -> str:
    return in_schema(TOKEN_ON_POSTGRESQL, compiler)


@compiles(current_token, "sqlite")
def _current_token_sqlite(*_: Any, **__: Any) -> str:
    return "(SELECT token FROM incident_token WHERE slot = 0)"


class feed_horizon(FunctionElement[int]):  # noqa: N801
    """The place in the order of events below which no event can be added any more."""

    type = BigInteger()
    inherit_cache = True


@compiles(feed_horizon)
def _feed_horizon(*_: Any, **__: Any) -> str:
    return "CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint)"


@compiles(feed_horizon, "sqlite")
def _feed_horizon_sqlite(*_: Any, **__: Any) -> str:
    # SQLite has one writer at a time, so that ids are in the order of the commits.
    return "1"
