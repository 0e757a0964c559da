"""Databases of PostgreSQL that serve one test after another.

A new database costs its server most of what a short test costs: the copy, the caches of the first
connection, and the end of the files. Removing a few rows costs a fiftieth of that.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final, Self

import psycopg
from psycopg.sql import SQL, Identifier, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from psycopg import sql

    from tests.conftest import Administrator

KEPT: Final = ("incident_token", "incidentkit_version")
"""The tables whose rows stay."""

CATALOGS: Final = {
    "pg_attribute": "attrelid",
    "pg_class": "oid",
    "pg_constraint": "oid",
    "pg_event_trigger": "oid",
    "pg_index": "indexrelid",
    "pg_namespace": "oid",
    "pg_proc": "oid",
    "pg_publication": "oid",
    "pg_trigger": "oid",
    "pg_type": "oid",
}
"""What describes a schema, with the columns of its objects."""

FIRST_OBJECT: Final = 16384
"""The least id of an object that does not belong to PostgreSQL itself."""

END_OTHERS: Final = """
SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


class ReusedDatabase:
    """A database in which tests may change rows of the tables of one schema.

    Args:
        administrator: Creates and drops it.
        template: What it is a copy of; its tables in the schema have no rows.
        schema: The schema.

    Attributes:
        url: The database, as a superuser.
        tests: The number of tests that have used it.
    """

    def __init__(self, administrator: Administrator, template: str, schema: str) -> None:
        self.tests = 0
        self._opened = ExitStack()
        self.url = self._opened.enter_context(administrator.database(template=template))
        self._connection = self._opened.enter_context(psycopg.connect(self.url, autocommit=True))
        self._statements = self._cleaning(schema)
        self._version = Identifier(schema, "incidentkit_version")
        self._before = self._state()

    def clean(self) -> bool:
        """Remove what the test has left, as if it had not run.

        Connections that it has left open end first.

        Returns:
            Whether the database can serve another test: its schema is as before.
        """
        self._connection.execute(END_OTHERS)
        if self._state() != self._before:
            return False
        self._connection.execute(self._statements)
        return True

    def close(self) -> None:
        """Drop it, before the next database is created."""
        self._opened.close()

    def rows_of(self, *schemas: str) -> list[object]:
        """Return the rows of every table in some schemas."""
        return [
            (name, self._connection.execute(SQL("TABLE {}").format(Identifier(*name))).fetchall())
            for schema in schemas
            for name in self._tables(schema)
        ]

    def _tables(self, schema: str) -> list[tuple[str, str]]:
        select = "SELECT schemaname, tablename FROM pg_tables WHERE schemaname = %s ORDER BY 2"
        return [(schema, name) for schema, name in self._connection.execute(select, (schema,))]

    def _state(self) -> object:
        """Return a value that differs after any change of the schema."""
        version = SQL("(SELECT sum(hashtext(format('%s %s', xmin, ctid))) FROM {} WHERE {} >= {})")
        sums = SQL(", ").join(
            version.format(Identifier(catalog), Identifier(column), Literal(FIRST_OBJECT))
            for catalog, column in CATALOGS.items()
        )
        select = SQL("SELECT version_num, {} FROM {}").format(sums, self._version)
        return self._connection.execute(select).fetchall()

    def _cleaning(self, schema: str) -> sql.Composed:
        """Return the statements that remove all rows, without triggers, and replace the tokens."""
        deletes = [
            SQL("DELETE FROM {};").format(Identifier(*name))
            for name in self._tables(schema)
            if name[1] not in KEPT
        ]
        token = Identifier(schema, "incident_token")
        return SQL("").join(
            [
                SQL("BEGIN; SET LOCAL session_replication_role = replica;"),
                *deletes,
                SQL("DELETE FROM {} WHERE slot NOT BETWEEN 0 AND 15;").format(token),
                SQL("UPDATE {} SET token = gen_random_uuid();").format(token),
                SQL(
                    "SELECT setval(format('%I.%I', schemaname, sequencename), start_value, false) "
                    "FROM pg_sequences WHERE schemaname = {};"
                ).format(Literal(schema)),
                SQL("COMMIT"),
            ]
        )


class ReusedDatabases:
    """The databases of a test process, one of each template.

    Args:
        administrator: Creates and drops them.
        max_tests: The number of tests after which one is dropped, since the rows of tests before
            take place although they are removed.
    """

    def __init__(self, administrator: Administrator, *, max_tests: int) -> None:
        self._administrator = administrator
        self._max_tests = max_tests
        self._open: dict[str, ReusedDatabase] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._open:
            self._open.popitem()[1].close()

    @contextmanager
    def database(self, template: str, *, schema: str) -> Iterator[ReusedDatabase]:
        """Yield a database for one test, and drop it if another test cannot use it."""
        database = self._open.pop(template, None)
        if database is None:
            database = ReusedDatabase(self._administrator, template, schema)
        try:
            yield database
            database.tests += 1
            if database.tests < self._max_tests and database.clean():
                self._open[template] = database
        finally:
            if template not in self._open:
                database.close()
