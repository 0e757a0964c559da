"""How a store opens, fails, handles cancellation and uses its indexes, on both databases."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from attrs import asdict
from sqlalchemy import make_url
from sqlalchemy.dialects.sqlite import dialect

from incidentkit import (
    ClientClosed,
    InvalidSettings,
    ListQuery,
    NewIncident,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
)
from incidentkit.opening import store_on
from incidentkit.store import RequestRecord, SearchQuery, StoreOptions, store_from_url
from incidentkit.store.migrate import downgrade, upgrade
from incidentkit.store.postgresql import errors as postgresql_errors
from incidentkit.store.postgresql.driver import compile_statement
from incidentkit.store.postgresql.pool import PoolExecutor
from incidentkit.store.request_log import INSERT_REQUEST
from incidentkit.store.sql.rows import EVENT_COLUMNS, read_event, read_incident, read_page
from incidentkit.store.sql.statements import SELECT_PAGE
from incidentkit.store.sqlite import errors as sqlite_errors
from incidentkit.store.sqlite import threads as sqlite
from incidentkit.store.sqlite.threads import ThreadsExecutor
from tests.hosts import host_engine, run_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from incidentkit.store.ports import IncidentStore

DISK_FULL = NewIncident("Disk is full", source="monitoring")


@pytest.fixture
async def store(url: str) -> AsyncIterator[IncidentStore]:
    """An open, empty store."""
    store = store_from_url(url)
    await store.open()
    yield store
    await store.close()


@pytest.mark.parametrize("by_status", [False, True])
@pytest.mark.parametrize("by_source", [False, True])
@pytest.mark.usefixtures("store")
async def test_every_list_is_read_from_an_index(
    url: str, *, by_status: bool, by_source: bool
) -> None:
    """For each filter, a page is read in order from an index, without a sort."""
    compiled = compile_statement(SELECT_PAGE[by_status, by_source, "near"])
    values = {"status": "new", "source": "partner", "limit": 10, "offset": 5}
    arguments = [values[name] for name in compiled.parameters]
    if url.startswith("postgresql"):
        connection = await asyncpg.connect(url)
        await connection.execute(
            'INSERT INTO "Incident" (incident_message, incident_type, source) '
            "SELECT 'Disk is full', (ARRAY['new', 'failed'])[i % 2 + 1]::incidentstatus, "
            "(ARRAY['partner', 'operator'])[i / 2 % 2 + 1]::incidentsource "
            "FROM generate_series(1, 20000) AS i"
        )
        await connection.execute('ANALYZE "Incident"')
        rows = await connection.fetch(f"EXPLAIN {compiled.text}", *arguments)
        await connection.close()
        plan = "\n".join(row[0] for row in rows)
        # The final sort covers only the page, which is already in order.
        assert "Index Scan Backward" in plan
        assert plan.index("Limit") < plan.index("Index Scan Backward")
        page = plan[plan.index("Limit") :]
        assert "Sort" not in page
        assert "Filter" not in page
    else:
        statement = SELECT_PAGE[by_status, by_source, "any"].params(**values)
        literal = statement.compile(dialect=dialect(), compile_kwargs={"literal_binds": True})
        steps = await run_sql(url, f"EXPLAIN QUERY PLAN {literal}")
        plan = "\n".join(step[3] for step in steps)
        assert "USING INDEX ix_Incident" in plan
        # The final sort covers only the page, which is already in order.
        assert "TEMP B-TREE" not in plan[: plan.index("LEFT-JOIN")]


async def test_a_cancelled_call_leaves_the_store_whole(store: IncidentStore) -> None:
    """Calls cancelled at any point leave a working store and lose no stored incident."""
    await store.create(DISK_FULL)
    for turns in range(12):
        calls = [
            asyncio.ensure_future(call)
            for call in (store.create(DISK_FULL), store.get(1), store.list(ListQuery()))
        ]
        for _ in range(turns):
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert (await store.create(DISK_FULL)).incident_id <= 14
    assert await store.get(1) is not None


async def test_a_file_that_is_being_written_can_be_opened(sqlite_url: str, tmp_path: Path) -> None:
    """An SQLite file can be opened while another program writes to it, even before WAL mode."""
    await upgrade(sqlite_url)
    other = sqlite3.connect(tmp_path / "incidents.db", isolation_level=None)
    assert other.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
    other.execute("BEGIN IMMEDIATE")
    store = store_from_url(sqlite_url)
    await store.open()
    creating = asyncio.ensure_future(store.create(DISK_FULL))
    await asyncio.sleep(0)
    other.execute("COMMIT")
    other.close()
    assert (await creating).incident_id == 1
    await store.close()


async def test_request_records_are_appended(store: Any, url: str) -> None:
    """A batch of request records is written to the `request_log` table, in order."""
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    records = [
        RequestRecord(at, "GET", "/incident/get", 200, 1.25, f"request-{number}")
        for number in range(3)
    ]
    await store.append(INSERT_REQUEST, [asdict(record) for record in records])
    rows = await run_sql(
        url,
        "SELECT method, route, status, duration_ms, request_id FROM request_log "
        "ORDER BY request_log_id",
    )
    assert rows == [("GET", "/incident/get", 200, 1.25, f"request-{number}") for number in range(3)]


async def test_a_batch_of_request_records_is_all_or_nothing(store: Any, url: str) -> None:
    """A batch with an invalid record stores none of its records, and the store stays usable."""
    at = datetime(2026, 1, 2, tzinfo=UTC)
    broken: Any = None
    rows = [
        asdict(RequestRecord(at, "GET", "/", 200, 1.0, "one")),
        asdict(RequestRecord(at, broken, "/", 200, 1.0, "two")),
    ]
    with pytest.raises(Exception, match="cannot be used"):
        await store.append(INSERT_REQUEST, rows)
    assert await run_sql(url, "SELECT * FROM request_log") == []
    await store.append(INSERT_REQUEST, rows[:1])
    assert len(await run_sql(url, "SELECT * FROM request_log")) == 1


async def test_check_tells_a_schema_that_changed(store: IncidentStore, url: str) -> None:
    """`check` passes on the current schema and names the upgrade command on any other."""
    await store.check()
    await downgrade(url)
    with pytest.raises(SchemaOutOfDate, match="incidentkit db upgrade"):
        await store.check()


async def test_a_missing_table_is_a_schema_out_of_date(store: IncidentStore, url: str) -> None:
    """A missing table is reported as an out-of-date schema."""
    await run_sql(url, 'DROP TABLE "Incident"')
    with pytest.raises(SchemaOutOfDate):
        await store.list(ListQuery())


async def test_a_closed_store_says_so(url: str) -> None:
    """A store that is not open raises ClientClosed, and closing it twice is no error."""
    store = store_from_url(url)
    with pytest.raises(ClientClosed):
        await store.get(1)
    await store.open()
    await store.close()
    await store.close()
    with pytest.raises(ClientClosed):
        await store.create(DISK_FULL)


async def test_a_store_can_be_opened_again(url: str) -> None:
    """A store that is opened again has its incidents."""
    store = store_from_url(url)
    for number in (1, 2):
        await store.open()
        assert (await store.create(DISK_FULL)).incident_id == number
        await store.close()


async def test_echo_logs_statements_without_their_values(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`echo` logs the statements without the values of their parameters."""
    caplog.set_level("INFO", logger="incidentkit.store")
    store = store_from_url(url, StoreOptions(echo=True))
    await store.open()
    await store.create(NewIncident("A secret message", source="operator"))
    await store.close()
    assert 'INSERT INTO "Incident"' in caplog.text
    assert "A secret message" not in caplog.text


@pytest.mark.parametrize("url", ["mysql://localhost/x", "nonsense", "", "postgresql"])
def test_other_urls_are_refused(url: str) -> None:
    """A URL of another database raises InvalidSettings with the supported schemes."""
    with pytest.raises(InvalidSettings, match="must start with postgresql://"):
        store_from_url(url)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("postgresql://localhost/x", PoolExecutor),
        ("postgres://localhost/x", PoolExecutor),
        ("postgresql+asyncpg://localhost/x?ssl=require", PoolExecutor),
        ("sqlite+aiosqlite:///x.db", ThreadsExecutor),
        ("sqlite:///:memory:", ThreadsExecutor),
    ],
)
def test_the_url_chooses_the_store(url: str, kind: type[object]) -> None:
    """Each common form of URL selects its store."""
    store: Any = store_from_url(url)
    assert isinstance(store._connections, kind)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://localhost:notaport/x",
        "postgresql://localhost/x?sslmode=nonsense",
        "sqlite+aiosqlite:///x.db?nonsense=1",
        "sqlite+aiosqlite://host/x.db",
        "sqlite+aiosqlite://host:port/x.db",
        "sqlite+aiosqlite:///x%00y.db",
        "sqlite+aiosqlite:///x\x00y.db",
    ],
)
async def test_a_broken_url_is_a_typed_error(url: str) -> None:
    """A malformed URL raises InvalidSettings, from a store and from a migration."""
    with pytest.raises(InvalidSettings, match="database_url"):
        await store_from_url(url).open()
    with pytest.raises(InvalidSettings, match="database_url"):
        await upgrade(url)


async def test_a_file_that_cannot_be_opened_is_a_typed_error() -> None:
    """An SQLite file in a missing folder raises StoreUnavailable, which names its path."""
    with pytest.raises(StoreUnavailable) as caught:
        await store_from_url("sqlite+aiosqlite:////nowhere/at/all.db").open()
    assert caught.value.place == "/nowhere/at/all.db"
    assert caught.value.sqlstate == "SQLITE_CANTOPEN"


async def test_a_password_is_in_no_traceback() -> None:
    """The traceback for a malformed URL does not show its password."""
    secret = "s3{}et".format("cr")
    with pytest.raises(InvalidSettings) as caught:
        await store_from_url(f"postgresql://user:{secret}/x@127.0.0.1/db").open()
    assert secret not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pool_size", 0),
        ("pool_size", True),
        ("max_overflow", -1),
        ("connect_timeout", 0),
        ("pool_timeout", float("inf")),
        ("statement_timeout", -1),
        ("statement_timeout", "soon"),
    ],
)
def test_options_that_cannot_be_used_are_refused_by_name(option: str, value: Any) -> None:
    """The error for a size or timeout out of range names the option."""
    with pytest.raises(InvalidSettings) as caught:
        StoreOptions(**{option: value})
    assert caught.value.name == option


async def test_the_smallest_pool_is_enough(url: str) -> None:
    """Concurrent calls work with a single connection."""
    options = StoreOptions(pool_size=1, max_overflow=0)
    store = store_from_url(url, options)
    await store.open()
    for _ in range(3):
        await store.token()
        await store.create(DISK_FULL)
        await asyncio.gather(*(store.list(ListQuery()) for _ in range(10)))
    await store.close()


async def test_a_row_that_breaks_the_schema_is_a_typed_error(url: str) -> None:
    """A row that is not a valid incident raises StoreError."""
    store = store_from_url(url)
    await store.open()
    await store.create(DISK_FULL)
    if url.startswith("postgresql"):
        await run_sql(url, 'ALTER TABLE "Incident" ALTER source DROP NOT NULL')
        await run_sql(url, 'UPDATE "Incident" SET source = NULL')
    else:
        with sqlite3.connect(url.removeprefix("sqlite+aiosqlite:///")) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            connection.execute("UPDATE \"Incident\" SET source = 'nobody'")
        connection.close()
    refusal = "a row holds what no incident can have"
    with pytest.raises(StoreError, match=refusal):
        await store.get(1)
    with pytest.raises(StoreError, match=refusal):
        _ = (await store.list(ListQuery())).json
    with pytest.raises(StoreError, match=refusal):
        _ = (await store.list(ListQuery())).incidents
    await store.close()


@pytest.mark.parametrize("value", ["'yesterday'", "17"])
@pytest.mark.parametrize("hosted", [False, True])
async def test_a_time_that_cannot_be_read_is_a_typed_error(
    sqlite_url: str, value: str, *, hosted: bool
) -> None:
    """A row of an SQLite file with another value for a time raises StoreError, on an engine too."""
    async with host_engine(sqlite_url) as engine:
        store = store_on(engine if hosted else sqlite_url)
        await store.open()
        await store.create(DISK_FULL)
        await run_sql(sqlite_url, f'UPDATE "Incident" SET last_seen_at = {value}')
        for read in (store.get(1), store.list(ListQuery()), store.search(SearchQuery())):
            with pytest.raises(StoreError, match="a row holds what no incident can have"):
                await read
        await store.close()


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, AttributeError, RuntimeError])
@pytest.mark.parametrize(
    "translate", [sqlite_errors.translate_error, postgresql_errors.translate_error]
)
def test_no_exception_of_a_driver_counts_as_a_corrupt_row(
    error: type[Exception], translate: Callable[[Exception], StoreError]
) -> None:
    """Only the reading of a row says that a row is corrupt, not an exception around it."""
    assert "row" not in translate(error("a future belongs to a different loop")).reason


def _read_page(rows: Any) -> object:
    return read_page(rows, ThreadsExecutor(make_url("sqlite://"), StoreOptions()))


@pytest.mark.parametrize(
    ("read", "rows"),
    [
        (read_incident, ()),
        (read_incident, ("token",)),
        (read_event, ()),
        (read_event, range(len(EVENT_COLUMNS) - 1)),
        (read_event, range(len(EVENT_COLUMNS) + 1)),
        (_read_page, []),
        (_read_page, [("token",)]),
    ],
)
def test_rows_of_another_statement_do_not_count_as_corrupt(
    read: Callable[[Any], object], rows: Any
) -> None:
    """Rows with too few or too many columns are a StoreError that does not blame the stored row."""
    with pytest.raises(StoreError, match="another statement"):
        read(rows)


async def test_waiting_for_another_writer_ends(sqlite_url: str, tmp_path: Path) -> None:
    """While another process locks an SQLite file, writes time out with StoreUnavailable."""
    store = store_from_url(sqlite_url, StoreOptions(pool_timeout=30, statement_timeout=0.1))
    await store.open()
    other = sqlite3.connect(tmp_path / "incidents.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(
            *(store.create(DISK_FULL) for _ in range(3)), return_exceptions=True
        )
    assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
    other.execute("ROLLBACK")
    other.close()
    await store.create(DISK_FULL)
    await store.close()


async def test_a_caller_is_not_kept_longer_than_its_timeouts(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call on SQLite times out while its statement runs on, and close waits for the statement."""
    store: Any = store_on(sqlite_url)
    proceed = threading.Event()
    fetch = sqlite.OwnConnection.fetch
    hanging = False

    def never_ending(*call: Any) -> Any:
        if not hanging:
            return fetch(*call)
        proceed.wait()
        return []

    monkeypatch.setattr(sqlite.OwnConnection, "fetch", never_ending)
    await store.open()
    store._connections._patience = 0.1
    hanging = True
    with pytest.raises(StoreUnavailable, match="did not answer in time"):
        async with asyncio.timeout(20):
            await store.list(ListQuery())
    proceed.set()
    await store.close()
