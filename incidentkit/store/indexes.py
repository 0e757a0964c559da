"""Build indexes in a migration while other programs read and write the table.

PostgreSQL builds such an index outside a transaction. An interrupted build leaves an invalid index,
which the next attempt removes. SQLite builds each index in a transaction of its own, so that other
writers wait for one index at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import sqlalchemy as sa
from alembic import op

from incidentkit.store.schema import VERSION_TABLE, in_the_way

SETTINGS: Final = ("search_path", "lock_timeout", "statement_timeout", "transaction_timeout")
"""Settings on PostgreSQL that each transaction of a migration passes on to the next one."""

GAP: Final = 0.2
"""Seconds between two transactions on SQLite. Waiting writers try every tenth of a second."""

_REVISION: Final = sa.text(f"SELECT version_num FROM {VERSION_TABLE}")

_FINISHED: Final = sa.text(
    "SELECT i.indisvalid FROM pg_class c JOIN pg_class t ON t.relnamespace = c.relnamespace "
    "LEFT JOIN pg_index i ON i.indexrelid = c.oid AND i.indrelid = t.oid "
    "WHERE c.relname = :name AND t.oid = CAST(:table AS regclass)"
)
"""Returns whether an index is complete, or NULL if something else has its name."""


class Overtaken(Exception):
    """Another process has continued the migration between two of its transactions."""


def build_index(name: str, table: str, definition: str, *, unique: bool = False) -> None:
    """Build an index unless it exists.

    If the table has rows, first commit everything that the migration has done.

    Args:
        name: The name of the index, without quotes.
        table: The name of the table, without quotes.
        definition: The rest of the statement after the table's name. On PostgreSQL, ``{schema}`` in
            it stands for the schema of the table.
        unique: Whether it is a unique index.

    Raises:
        StoreError: If something else on PostgreSQL has the name.
    """
    if has_rows(table):
        start_transaction()
        if _on_postgresql():
            _build_concurrently(name, table, definition, unique=unique)
            return
    schema = schema_of(table) if _on_postgresql() else "main"
    definition = definition.format(schema=schema)
    _run(f'CREATE {_kind(unique=unique)} IF NOT EXISTS "{name}" ON "{table}" {definition}')


def drop_index(name: str, table: str) -> None:
    """Drop an index if it exists, while other programs read and write its table.

    If the table has rows, first commit everything that the migration has done.
    """
    if has_rows(table):
        start_transaction()
        if _on_postgresql():
            schema = schema_of(table)
            with outside_transaction():
                run_alone(f'DROP INDEX CONCURRENTLY IF EXISTS {schema}."{name}"')
            return
    op.execute(f'DROP INDEX IF EXISTS "{name}"')


def check_free(table: str, *names: str) -> None:
    """Raise if something else on PostgreSQL has the name of an index that is built later.

    Raises:
        StoreError: With the name.
    """
    for name in names:
        parameters = {"name": name, "table": f'"{table}"'}
        if op.get_bind().execute(_FINISHED, parameters).first() is not None:
            raise in_the_way(name, "relation")


def _build_concurrently(name: str, table: str, definition: str, *, unique: bool) -> None:
    schema = schema_of(table)
    qualified = f'{schema}."{table}"'
    _wait_for_builds(qualified)
    finished = op.get_bind().execute(_FINISHED, {"name": name, "table": qualified}).scalars().all()
    if finished == [True]:
        return
    if finished == [None]:
        raise in_the_way(name, "relation")
    with outside_transaction():
        if finished == [False]:
            run_alone(f'DROP INDEX CONCURRENTLY {schema}."{name}"')
        definition = definition.format(schema=schema)
        kind = _kind(unique=unique)
        run_alone(f'CREATE {kind} CONCURRENTLY "{name}" ON {qualified} {definition}')


def _kind(*, unique: bool) -> str:
    return "UNIQUE INDEX" if unique else "INDEX"


def has_rows(table: str) -> bool:
    """Return whether a table has a row. Without rows, a migration needs only one transaction."""
    return bool(op.get_bind().scalar(sa.text(f'SELECT EXISTS (SELECT 1 FROM "{table}")')))


def _wait_for_builds(table: str) -> None:
    """Wait until the server has finished the build of a client that was killed.

    Readers and writers do not wait behind this lock.
    """
    with _kept_settings():
        op.execute("SET LOCAL lock_timeout = 0")
        _run(f"LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE")


def _run(statement: str) -> None:
    # Not op.execute(), which would take a colon in the name of a schema for a parameter.
    op.get_bind().exec_driver_sql(statement)


def run_alone(statement: str) -> None:
    """Run a statement that PostgreSQL accepts only outside a transaction."""
    # The driver sends its text in one message. SQLAlchemy would prepare it first, and a pooler
    # could run it on another connection of the server.
    connection: Any = op.get_bind().connection.dbapi_connection
    connection.run_async(lambda driver: driver.execute(statement))


def start_transaction() -> None:
    """Commit what the migration has done so far, and begin another transaction.

    Raises:
        Overtaken: If another process has continued the migration meanwhile, on SQLite.
    """
    if _on_postgresql():
        with outside_transaction():
            pass
        return
    connection: Any = op.get_bind().connection.driver_connection
    if connection.in_transaction:
        revision = op.get_bind().scalar(_REVISION)
        op.execute("COMMIT")
        time.sleep(GAP)
        op.execute("BEGIN IMMEDIATE")
        if op.get_bind().scalar(_REVISION) != revision:
            raise Overtaken


@contextmanager
def outside_transaction() -> Iterator[None]:
    """Commit what the migration has done so far on PostgreSQL; begin a transaction at the end."""
    with _kept_settings(), op.get_context().autocommit_block():
        yield


@contextmanager
def _kept_settings() -> Iterator[None]:
    """Pass the settings of the transaction on to the next one."""
    found = op.get_bind().execute(
        sa.text("SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY(:names)"),
        {"names": list(SETTINGS)},
    )
    settings = found.all()
    yield
    for name, value in settings:
        op.get_bind().execute(
            sa.text("SELECT set_config(:name, :value, true)"), {"name": name, "value": value}
        )


def schema_of(table: str) -> str:
    """Return the schema of a table on PostgreSQL, quoted for use in a statement."""
    return str(
        op.get_bind().scalar(
            sa.text(
                "SELECT CAST(CAST(relnamespace AS regnamespace) AS text) FROM pg_class "
                "WHERE oid = CAST(:table AS regclass)"
            ),
            {"table": f'"{table}"'},
        )
    )


def _on_postgresql() -> bool:
    return op.get_bind().dialect.name == "postgresql"
