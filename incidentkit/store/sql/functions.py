"""SQL expressions and types that compile differently for each database."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from sqlalchemy import BigInteger, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import UserDefinedType

from incidentkit.store.sql.naming import in_schema
from incidentkit.store.sql.rows import UtcDateTime
from incidentkit.store.sql.triggers import TOKEN_TRIGGERS, quoted


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


class JsonObject(UserDefinedType[str]):
    """A column with a JSON object: ``jsonb`` on PostgreSQL, text on SQLite.

    PostgreSQL's own type would load the dialect of PostgreSQL, also for an SQLite file.
    """

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Return the type on PostgreSQL."""
        return "JSONB"


@compiles(JsonObject, "sqlite")
def _json_object_sqlite(*_: Any, **__: Any) -> str:
    return "TEXT"


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


_INCIDENT: Final = "CAST('\"Incident\"' AS regclass)"

TOKEN_ON_POSTGRESQL: Final = f"""(
    SELECT CASE WHEN count(*) FILTER (WHERE part BETWEEN -3 AND 15) = 19 THEN
        encode(sha256(
            CAST('secret' AS bytea)
            || string_agg(value, CAST('' AS bytea) ORDER BY part)
            || int8send((pg_control_system()).system_identifier)
        ), 'hex')
    END
    FROM (
        SELECT slot, uuid_send(token) || xidsend(xmin)
        FROM incident_token
        UNION ALL
        SELECT -1, xidsend(xmin)
        FROM pg_class AS incident
        WHERE oid = {_INCIDENT}
            AND relpersistence = 'p'
            AND NOT relrowsecurity
            AND has_table_privilege(oid, 'SELECT')
            AND NOT (
                relhassubclass
                AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = incident.oid)
            )
        UNION ALL
        SELECT CASE tgtype WHEN 29 THEN -2 ELSE -3 END, xidsend(xmin)
        FROM pg_trigger
        WHERE tgrelid = {_INCIDENT}
            AND tgenabled = 'A'
            AND (
                tgname = 'incident_token_change' AND tgtype = 29
                OR tgname = 'incident_token_truncate' AND tgtype = 32
            )
        UNION ALL
        SELECT -10 - attnum, xidsend(xmin)
        FROM pg_attribute
        WHERE attrelid = {_INCIDENT} AND attnum > 0
    ) AS parts (part, value)
)"""
"""The token as text, for statements that are written as text.

It is a hash of the tokens in the table, and of the place of the incidents. The constant makes it
another one than that of earlier versions, which stored theirs in a shared cache:

- ``xmin``, the transaction that wrote a row, and the server's identifier. A copy of the tokens in
  another table or on another server is another token. A standby has the token of its primary.
- the rows of the catalog that describe the table, its columns and the triggers. ``ALTER TABLE``
  writes them again, also if it changes incidents without firing a trigger.

It is null if equal tokens would not mean equal lists: if one of the sixteen rows is missing, one of
the triggers is missing or does not always fire, the table has children, whose triggers are their
own, is not logged, so that a crash empties it, or has row security, so that roles see different
rows, or the role must not read it."""


@compiles(current_token)
def _current_token(_: Any, compiler: SQLCompiler, **__: Any) -> str:
    return in_schema(TOKEN_ON_POSTGRESQL, compiler)


TOKEN_ON_SQLITE: Final = f"""(
    SELECT token || ' ' || rowid || ' ' || (SELECT schema_version FROM pragma_schema_version)
    FROM incident_token
    WHERE slot = 0 AND (
        SELECT count(*)
        FROM sqlite_master
        WHERE type = 'trigger' AND sql IN ({", ".join(map(quoted, TOKEN_TRIGGERS.values()))})
    ) = {len(TOKEN_TRIGGERS)}
)"""
"""The token as text: that in the table, with its random ``rowid``, which a dump as SQL does not
carry to another file, and the number of changes of the schema, since one that recreates the table
fires no trigger. It is null if a trigger is missing, or is not the one that the schema needs."""


@compiles(current_token, "sqlite")
def _current_token_sqlite(*_: Any, **__: Any) -> str:
    return TOKEN_ON_SQLITE


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
