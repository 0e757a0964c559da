"""Compare the functions, triggers and indexes of a database with those of the newest revision.

Opening, ``check``, ``incidentkit db check`` and ``incidentkit db upgrade`` all compare a database
with these definitions. The last one restores those that are missing or differ.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, Final, Literal, TypeAlias

from attrs import frozen
from sqlalchemy import Executable, Index

from incidentkit.store.schema import VERSION_TABLE, WRITER, WRITER_CHECK
from incidentkit.store.sql.naming import RULE_FUNCTIONS, TABLES, WORDS_FUNCTION, text
from incidentkit.store.sql.tables import TEXT_INDEX, metadata, token_table
from incidentkit.store.sql.triggers import (
    SQLITE_TRIGGERS,
    TOKEN_BODY,
    TOKEN_FUNCTION,
    TOKEN_SETTINGS,
    quoted,
)

Kind: TypeAlias = Literal["function", "trigger", "index", "table", "constraint"]

Part: TypeAlias = tuple[Kind, str]
"""The kind and the name of a part of the schema."""

INDEXES: Final[Mapping[str, Index]] = {
    str(index.name): index for table in metadata.tables.values() for index in table.indexes
}
"""The declared indexes, by name."""

NUMBERED: Final[Mapping[str, str]] = {"Incident": "incident_id", "incident_event": "event_id"}
"""The key of each table whose ids SQLite must not give out again when the rows that had the largest
are gone."""


@frozen
class Difference:
    """A part that a database lacks, or has with another definition.

    Attributes:
        kind: ``function``, ``trigger``, ``index``, ``table`` or ``constraint``.
        name: Its name.
        missing: Whether the database does not have it at all.
    """

    kind: Kind
    name: str
    missing: bool

    @property
    def part(self) -> str:
        """The name of the part in a message."""
        return f"the {self.kind} {self.name}"

    def __str__(self) -> str:
        return f"{self.part} {'is missing' if self.missing else 'was changed'}"


@frozen
class Schema:
    """The schema of a database, as it was found.

    Attributes:
        revision: Its revision; None: it has none.
        differences: The parts that are not as the newest revision defines them.
        row_security: Whether policies decide which rows a session sees.
    """

    revision: str | None
    differences: tuple[Difference, ...]
    row_security: bool


_TABLES: Final = ", ".join(quoted(name) for name in metadata.tables)
_NUMBERS: Final = ", ".join(f"to_regclass({quoted(name)})" for name in TABLES)
_FUNCTIONS: Final = ", ".join(f"to_regprocedure('{name}(text)')" for name in RULE_FUNCTIONS)

SELECT_ON_POSTGRESQL: Final[Executable] = text(f"""
    WITH parts (kind, name, definition) AS (
        SELECT
            'trigger',
            CAST(tgname AS text),
            concat_ws(
                ' ',
                tgtype,
                -- The columns that an update has to name.
                nullif(CAST(tgattr AS text), ''),
                tgenabled,
                tgdeferrable,
                tginitdeferred,
                -- The condition names its own table.
                tgqual IS NOT NULL AND position(
                    '''' || replace(CAST(CAST(tgrelid AS regclass) AS text), '''', '''''')
                        || '''::regclass'
                    -- Here and below without the quotes of the setting quote_all_identifiers.
                    IN replace(pg_get_triggerdef(pg_trigger.oid), '"regclass"', 'regclass')
                ) > 0,
                proname,
                prosecdef,
                replace(array_to_string(proconfig, ' '), '"', ''),
                prosrc
            )
        FROM pg_trigger
        JOIN pg_proc ON pg_proc.oid = tgfoid
        WHERE tgrelid = to_regclass('"Incident"') AND NOT tgisinternal
        UNION ALL
        SELECT
            'function',
            CAST(proname AS text),
            -- Another rule of words has functions with other names.
            concat_ws(' ', provolatile, proparallel)
        FROM pg_proc
        WHERE oid = ANY(ARRAY[{_FUNCTIONS}])
        UNION ALL
        SELECT
            'index',
            CAST(relname AS text),
            concat_ws(
                ' ',
                indisvalid,
                indisunique,
                indpred IS NOT NULL,
                array_to_string(
                    ARRAY(
                        SELECT attname
                        FROM pg_attribute
                        WHERE attrelid = indexrelid
                        ORDER BY attnum
                    ),
                    ' '
                )
            )
        FROM pg_index
        JOIN pg_class ON pg_class.oid = indexrelid
        WHERE indrelid = ANY(ARRAY[{_NUMBERS}])
        UNION ALL
        SELECT 'table', CAST(relname AS text), ''
        FROM pg_class
        WHERE oid = to_regclass('{token_table.name}')
        UNION ALL
        SELECT 'constraint', CAST(conname AS text), replace(pg_get_expr(conbin, conrelid), '"', '')
        FROM pg_constraint
        WHERE conrelid = to_regclass('incident_event') AND contype = 'c'
        UNION ALL
        SELECT 'row security', CAST(relname AS text), ''
        FROM pg_class
        WHERE oid = ANY(ARRAY[{_NUMBERS}]) AND relrowsecurity
    )
    SELECT recorded.version_num, parts.kind, parts.name, parts.definition
    FROM {VERSION_TABLE} AS recorded
    LEFT JOIN parts ON true
""")
"""Returns the revision, and beside it each part of the schema with its definition."""

SELECT_ON_SQLITE: Final[Executable] = text(f"""
    SELECT recorded.version_num, parts.type, parts.name, parts.sql
    FROM {VERSION_TABLE} AS recorded
    LEFT JOIN sqlite_master AS parts
        ON parts.type IN ('trigger', 'index', 'table') AND parts.tbl_name IN ({_TABLES})
""")
"""The same on SQLite."""


def read_on_postgresql(rows: Sequence[Any]) -> Schema:
    """Return the schema of the rows of :data:`SELECT_ON_POSTGRESQL`."""
    return _read(rows, _on_postgresql())


def read_on_sqlite(rows: Sequence[Any], words: Mapping[str, str]) -> Schema:
    """Return the schema of the rows of :data:`SELECT_ON_SQLITE`.

    Args:
        rows: The rows.
        words: The triggers that index words, by name.
    """
    plain = [
        (revision, kind, name, _compared(kind, name, sql or ""))
        for revision, kind, name, sql in rows
    ]
    triggers: dict[Part, Collection[str]] = {
        ("trigger", name): (definition,) for name, definition in words.items()
    }
    return _read(plain, {**_on_sqlite(), **triggers})


def _read(rows: Sequence[Any], wanted: Mapping[Part, Collection[str]]) -> Schema:
    found = {(kind, name): definition for _, kind, name, definition in rows}
    return Schema(
        rows[0][0] if rows else None,
        tuple(
            Difference(*part, missing=part not in found)
            for part, definitions in wanted.items()
            if found.get(part) not in definitions
        ),
        any(kind == "row security" for kind, _ in found),
    )


@cache
def _on_postgresql() -> Mapping[Part, Collection[str]]:
    """Return the definitions that each part may have on PostgreSQL."""
    function = " ".join((TOKEN_FUNCTION, "t", *TOKEN_SETTINGS, TOKEN_BODY))
    wanted: dict[Part, Collection[str]] = {
        ("trigger", "incident_token_change"): (f"29 A t t t {function}",),
        ("trigger", "incident_token_truncate"): (f"32 A f f f {function}",),
        **{("function", name): ("i s",) for name in RULE_FUNCTIONS},
    }
    for name, index in INDEXES.items():
        columns = " ".join(index.columns.keys())
        partial = "t" if _condition(index) else "f"
        wanted["index", name] = (f"t {'t' if index.unique else 'f'} {partial} {columns}",)
    wanted["index", TEXT_INDEX] = (f"t f f {WORDS_FUNCTION}",)
    wanted["table", token_table.name] = ("",)
    wanted["constraint", WRITER_CHECK] = (f"(writer = {WRITER})",)
    return wanted


@cache
def _on_sqlite() -> Mapping[Part, Collection[str]]:
    """Return the definition that each part must have on SQLite."""
    wanted: dict[Part, Collection[str]] = {
        ("trigger", name): (definition,) for name, definition in SQLITE_TRIGGERS.items()
    }
    for name, index in INDEXES.items():
        table = "" if index.table is None else index.table.name
        create = (
            f"CREATE {'UNIQUE ' if index.unique else ''}INDEX {name} ON {table} {indexed(index)}"
        )
        wanted["index", name] = (create,)
    for name in (*NUMBERED, token_table.name):
        wanted["table", name] = ("",)
    return wanted


def indexed(index: Index) -> str:
    """Return the columns of a declared index with its condition, as SQL for both databases."""
    return f"({', '.join(index.columns.keys())}){_condition(index)}"


def _condition(index: Index) -> str:
    """Return the clause of a partial index."""
    condition = index.dialect_kwargs.get("sqlite_where")
    return "" if condition is None else f" WHERE {condition}"


def _plain(sql: str) -> str:
    """Return a statement without the quotes and spaces that make no difference."""
    return " ".join(sql.replace('"', "").split())


def _compared(kind: str, name: str, sql: str) -> str:
    """Return what is compared of the definition of a part on SQLite.

    Of a table, it is its key, or nothing if the key is as it must be: a host may change all else.
    """
    if kind == "table":
        key = NUMBERED.get(name)
        return "" if key is None or numbered(sql, key, name) == sql else key
    return _plain(sql) if kind == "index" else sql


def numbered(sql: str, key: str, name: str) -> str:
    """Return the definition of a table on SQLite with a key that gives no id out twice.

    A definition that has such a key, or of which the key is not found, is returned as it is.

    Args:
        sql: The definition, as SQLite keeps it.
        key: The column of the key.
        name: The name of the new table.
    """
    if "AUTOINCREMENT" in sql.upper():
        return sql
    column = rf'(?<!\w)["`\[]?{key}["`\]]?'
    text = re.sub(
        r"^CREATE\s+TABLE\s+[^(]+\(", f'CREATE TABLE "{name}" (', sql, flags=re.IGNORECASE
    )
    text = re.sub(
        rf',\s*(CONSTRAINT\s+("[^"]*"|\w+)\s+)?PRIMARY\s+KEY\s*\(\s*{column}\s*\)',
        "",
        text,
        flags=re.IGNORECASE,
    )
    text, columns = re.subn(
        rf"({column}\s+INTEGER)(\s+NOT\s+NULL)?(\s+PRIMARY\s+KEY)?(?=\s*[,)])",
        r"\1 NOT NULL PRIMARY KEY AUTOINCREMENT",
        text,
        flags=re.IGNORECASE,
    )
    return text if columns == 1 else sql
