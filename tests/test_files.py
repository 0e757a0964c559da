"""SQLite files that cannot be used, and files that change under an open client."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import tempfile
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import NullPool, event

from incidentkit import (
    IncidentClient,
    InvalidSettings,
    NewIncident,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
)
from incidentkit.http.health import readiness
from incidentkit.store import migrate
from incidentkit.store.schema import SCHEMA_REVISION, WRITER_CHECK
from incidentkit.store.sqlite import errors, file
from incidentkit.store.sqlite.threads import DatabaseFile
from incidentkit.store.sqlite.url import IN_MEMORY, sqlite_url
from tests.hosts import host_engine
from tests.programs import outcome, start
from tests.test_cli import errors as command_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

NOBODY = 65534

COMMANDS = (
    ["list"],
    ["create", "Disk is full", "--source", "monitoring"],
    ["get", "1"],
    ["search", "--text", "disk"],
    ["update-status", "1", "failed"],
    ["resolve", "disk"],
    ["note", "1", "The old logs were removed"],
    ["history", "1"],
    ["watch"],
    ["purge", "--older-than", "90d"],
    ["serve", "--port", "0"],
    ["serve", "--port", "0", "--workers", "2"],
    ["db", "upgrade"],
    ["db", "current"],
    ["db", "check"],
    ["db", "downgrade", "--yes"],
)


@pytest.fixture
def path(migrated_sqlite_url: str) -> Path:
    """A file with the newest schema, 100 incidents, and so more than one page of most tables."""
    path = Path(migrated_sqlite_url.removeprefix("sqlite+aiosqlite:///"))

    async def fill() -> None:
        async with IncidentClient.open(migrated_sqlite_url) as client:
            await client.create_many(
                NewIncident(f"Disk {number} is full " + "x" * 900, source="monitoring")
                for number in range(100)
            )

    asyncio.run(fill())
    return path


@asynccontextmanager
async def opened(way: str, path: Path) -> AsyncIterator[IncidentClient]:
    """Open a client on a file: by its URL, or on an engine of a host's."""
    url = f"sqlite+aiosqlite:///{path}"
    if way == "url":
        async with IncidentClient.open(url) as client:
            yield client
        return
    options: dict[str, Any] = {"poolclass": NullPool} if way == "unpooled engine" else {}
    async with host_engine(url, **options) as engine, IncidentClient.open(engine) as client:
        yield client


each_way = pytest.mark.parametrize("way", ["url", "engine", "unpooled engine"])


def size(path: Path) -> int:
    """Return the size of a file in bytes."""
    return path.stat().st_size


def names(folder: Path) -> set[str]:
    """Return the names of the files in a folder; none if there is no such folder."""
    return {each.name for each in folder.iterdir()} if folder.exists() else set()


def make_text(path: Path) -> None:
    """Replace the file by a text."""
    path.write_text("This is a text, and no database.\n" * 200)


def make_short(path: Path) -> None:
    """Cut the file within its first page."""
    os.truncate(path, 1000)


def cut_in_half(path: Path) -> None:
    """Cut the file in the middle."""
    os.truncate(path, path.stat().st_size // 2)


def scramble(path: Path) -> None:
    """Overwrite all pages but the first."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))


def make_folder(path: Path) -> None:
    """Replace the file by a folder."""
    path.unlink()
    path.mkdir()


def lose_folder(path: Path) -> None:
    """Remove the folder of the file."""
    shutil.rmtree(path.parent)


BROKEN = [
    (make_text, StoreError, "the file is not an SQLite database"),
    (make_short, StoreError, "the file is damaged"),
    (cut_in_half, StoreError, "the file is damaged"),
    (scramble, StoreError, "the file is damaged"),
    (make_folder, StoreUnavailable, "the file cannot be opened"),
    (lose_folder, StoreUnavailable, "the file cannot be opened"),
]


@each_way
@pytest.mark.parametrize(("spoil", "kind", "reason"), BROKEN)
def test_a_file_that_cannot_be_used_is_told(
    way: str, path: Path, spoil: Callable[[Path], None], kind: type[StoreError], reason: str
) -> None:
    """A text, a damaged file or a folder raises one error of the tree, from every opening path."""
    spoil(path)

    async def use() -> None:
        async with opened(way, path) as client:
            await client.list()

    url = f"sqlite+aiosqlite:///{path}"
    for work in (use(), migrate.upgrade(url), migrate.current(url), migrate.check(url)):
        with pytest.raises(StoreError, match=reason) as caught:
            asyncio.run(work)
        assert type(caught.value) is kind
        assert caught.value.place == str(path)
        assert (caught.value.sqlstate or "").startswith("SQLITE_")
        assert not caught.value.retryable


@each_way
async def test_a_failure_to_close_does_not_replace_the_error(
    way: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If opening fails and then closing fails too, the error of opening is raised."""

    async def fail(*_: object) -> None:
        raise RuntimeError("cannot close")

    for executor in (
        "incidentkit.store.sqlite.threads.ThreadsExecutor.close",
        "incidentkit.store.hosts.sqlite_engine.SqliteEngineExecutor.close",
    ):
        monkeypatch.setattr(executor, fail)
    make_text(path)
    with pytest.raises(StoreError, match="not an SQLite database"):
        async with opened(way, path):
            pass


@contextmanager
def without_privileges(path: Path) -> Iterator[Path]:
    """Yield a copy of a file in a folder of its own, as a user without any privilege."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        copy = Path(folder) / "incidents.db"
        shutil.copyfile(path, copy)
        Path(folder).chmod(0o755)
        before = os.geteuid()
        if before == 0:
            os.seteuid(NOBODY)
        try:
            yield copy
        finally:
            os.seteuid(before)
            Path(folder).chmod(0o755)


def protect(path: Path, mode: int) -> None:
    """Change the permissions of a file, which may belong to root."""
    before = os.geteuid()
    os.seteuid(os.getuid())
    path.chmod(mode)
    path.parent.chmod(0o555)
    os.seteuid(before)


@each_way
@pytest.mark.parametrize(
    ("mode", "code", "reason"),
    [
        (0o000, "SQLITE_CANTOPEN", "check its permissions"),
        (0o444, "SQLITE_READONLY_DIRECTORY", "its folder or medium is read-only"),
    ],
)
async def test_a_file_without_permission_is_told(
    way: str, path: Path, mode: int, code: str, reason: str
) -> None:
    """A file that may not be read, or a log that may not be written, is reported with the path."""
    async with opened(way, path) as client:
        # Loads what the user without privileges may not be allowed to read.
        await client.list()
    url = "sqlite+aiosqlite:///{}"
    with without_privileges(path) as copy:
        protect(copy, mode)
        opening = opened(way, copy)
        for work in (opening.__aenter__(), migrate.upgrade(url.format(copy))):
            with pytest.raises(StoreUnavailable, match=reason) as caught:
                await work
            assert caught.value.sqlstate == code
            assert caught.value.place == str(copy)
            assert not caught.value.retryable
        if mode:
            # The remedy that the message names.
            async with IncidentClient.open(f"{url.format(copy)}?immutable=1") as reader:
                assert len(await reader.list(limit=100)) == 100
                assert (await reader.search(text="disk", total=True)).total == 100
                with pytest.raises(StoreUnavailable, match="the file is read-only"):
                    await reader.create("Disk is full", source="monitoring")


async def create_many(client: IncidentClient) -> None:
    """Create incidents without end, one by one."""
    while True:
        await client.create("Disk is full " + "x" * 900, source="monitoring")


@pytest.mark.parametrize("way", ["url", "engine"])
async def test_a_full_disk_is_told(way: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that finds no space says so; reads go on, and later writes succeed."""
    before = file._prepare_connection
    pages = size(path) // 4096

    def limit(connection: Any, record: object) -> None:
        before(connection, record)
        connection.execute(f"PRAGMA max_page_count = {pages + 5}")

    monkeypatch.setattr(file, "_prepare_connection", limit)
    async with host_engine(f"sqlite+aiosqlite:///{path}") as engine:
        event.listen(engine.sync_engine, "connect", limit)
        database = engine if way == "engine" else f"sqlite+aiosqlite:///{path}"
        async with IncidentClient.open(database) as client:
            with pytest.raises(StoreUnavailable, match="the disk is full") as caught:
                await create_many(client)
            assert (caught.value.sqlstate, caught.value.retryable) == ("SQLITE_FULL", False)
            assert caught.value.place == str(path)
            assert len(await client.list(limit=10)) == 10
            await client.check()


def move(path: Path) -> None:
    """Move the file away."""
    path.rename(path.with_suffix(".old"))


def delete(path: Path) -> None:
    """Delete the file."""
    path.unlink()


def replace(path: Path) -> None:
    """Put another file with the same content in its place."""
    copy = path.with_suffix(".copy")
    shutil.copyfile(path, copy)
    copy.replace(path)


def lose(path: Path) -> None:
    """Move the folder of the file away."""
    path.parent.rename(path.parent.with_name("elsewhere"))


def move_to(path: Path, folder: Path) -> Path:
    """Move the file into a new folder."""
    folder.mkdir()
    return path.rename(folder / path.name)


@each_way
@pytest.mark.parametrize("change", [move, delete, replace, lose])
async def test_a_file_that_is_taken_away_is_told(
    way: str, path: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """Once the file has moved, writes, reads and readiness fail and say why; none is lost."""
    path = move_to(path, tmp_path / "data")
    async with opened(way, path) as client:
        last = await client.create("Disk is full", source="monitoring")
        await client.check()
        change(path)
        for call in (
            client.create("Disk is full", source="monitoring"),
            client.create_many([NewIncident("Disk is full", source="monitoring")]),
            client.update_status(1, "failed"),
            client.note(1, "The old logs were removed"),
            client.get(1),
            client.list(page=7),
            client.search(text="disk"),
            client.check(),
        ):
            with pytest.raises(StoreUnavailable, match="moved, deleted or replaced") as caught:
                await call
            assert caught.value.place == str(path)
        assert (path.name in names(tmp_path / "data")) is (change is replace)
    if change is not replace:
        return
    async with opened(way, path) as client:
        # The reopened client uses the new file.
        assert await client.get(last.incident_id) == last


@each_way
async def test_a_file_that_is_put_back_works_again(way: str, path: Path) -> None:
    """A file that comes back to its path serves the open client again."""
    async with opened(way, path) as client:
        move(path)
        with pytest.raises(StoreUnavailable, match="put it back"):
            await client.create("Disk is full", source="monitoring")
        path.with_suffix(".old").rename(path)
        created = await client.create("Disk is full", source="monitoring")
    async with opened(way, path) as client:
        assert await client.get(created.incident_id) == created


async def test_a_file_that_is_taken_away_under_a_waiting_write_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that waited for another process looks at the file after its wait."""
    async with opened("url", path) as client:
        await client.create("Disk is full", source="monitoring")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            began = asyncio.Event()
            loop = asyncio.get_running_loop()
            check = DatabaseFile.check

            def checked(database_file: DatabaseFile) -> None:
                check(database_file)
                loop.call_soon_threadsafe(began.set)

            monkeypatch.setattr(DatabaseFile, "check", checked)
            write = asyncio.ensure_future(client.create("Disk is full", source="monitoring"))
            async with asyncio.timeout(60):
                await began.wait()
            move(path)
            other.execute("ROLLBACK")
        with pytest.raises(StoreUnavailable, match="moved, deleted or replaced"):
            await write


async def test_readiness_tells_a_file_that_is_taken_away(path: Path) -> None:
    """The service is not ready once its file is gone, and its answer does not show the path."""
    async with opened("url", path) as client:
        ready = await readiness(client, None, cache_required=False)
        assert ready.ready
        delete(path)
        ready = await readiness(client, None, cache_required=False)
        assert not ready.ready
        assert ready.database.state == "unavailable"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_names_a_deleted_working_folder(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a deleted folder, every command fails with 1 and one line that says so."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert command_errors(*command, exit_code=1) == [
        f"Error: The database incidentkit.db is unavailable: {errors.NO_FOLDER.reason}"
    ]


def test_a_program_in_a_deleted_folder_works_with_an_absolute_path(tmp_path: Path) -> None:
    """A command that was started in a deleted folder uses a file with an absolute path."""
    script = """
import os, sys
os.mkdir(sys.argv[1]); os.chdir(sys.argv[1]); os.rmdir(sys.argv[1])
from incidentkit.cli import main
main(sys.argv[2:])
"""
    url = f"sqlite+aiosqlite:///{tmp_path / 'incidents.db'}"
    command = ["create", "Disk is full", "--source", "partner", "--database-url", url]
    program = ["-c", script, str(tmp_path / "gone")]
    exit_code, out, err = outcome(start(*command, program=program))
    assert (exit_code, err) == (0, "")
    assert "Disk is full" in out


async def test_a_deleted_working_folder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client and the migrations name a deleted folder, and an open client is not affected."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    url = "sqlite+aiosqlite:///incidents.db"
    folder.rmdir()
    for work in (IncidentClient.open(url).connect(), migrate.upgrade(url), migrate.check(url)):
        with pytest.raises(StoreUnavailable, match="the working folder was deleted") as caught:
            await work
        assert caught.value.place == "incidents.db"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_names_a_file_that_cannot_be_used(command: list[str], tmp_path: Path) -> None:
    """Every command reports a broken file with one line that names it, and with 1."""
    path = tmp_path / "text.db"
    make_text(path)
    url = f"sqlite+aiosqlite:///{path}"
    assert command_errors(*command, "--database-url", url, exit_code=1) == [
        (
            f"Error: The database {path} cannot be used: the file is not an SQLite database; "
            "correct the path (SQLITE_NOTADB)"
        )
    ]


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite+aiosqlite://",
        "sqlite+aiosqlite:///",
        "sqlite+aiosqlite:///?mode=ro",
        "sqlite+aiosqlite:///file:?uri=true",
    ],
)
async def test_an_empty_name_is_no_database(url: str) -> None:
    """A URL whose file is an empty variable is refused with what to write, never kept in memory."""
    works: list[Callable[[str], object]] = [
        IncidentClient.open,
        lambda url: asyncio.run(migrate.upgrade(url)),
    ]
    for work in works:
        with pytest.raises(InvalidSettings, match=r"names no file .*:memory:"):
            await asyncio.to_thread(work, url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite:///x.db?nonsense=1", "the parameter nonsense, which SQLite does not have"),
        ("sqlite:///x.db?timeout=3", "the parameter timeout"),
        ("sqlite:///x.db?mode=memory", "the parameter mode, .* write :memory:"),
        ("sqlite:///file:x?mode=memory&cache=shared&uri=true", "the parameter mode"),
        ("sqlite:///file::memory:?uri=true", "write :memory: alone"),
        ("sqlite:///:memory:?cache=shared", "which a database in memory does not take"),
        ("sqlite:///what?.db", "write it as %3F"),
        ("sqlite:///x.db?mode", "write it as %3F"),
    ],
)
def test_a_parameter_that_is_not_understood_is_named(url: str, reason: str) -> None:
    """An unknown parameter of a file is refused by its name, with what to write instead."""
    with pytest.raises(InvalidSettings, match=reason) as caught:
        IncidentClient.open(url)
    assert caught.value.name == "database_url"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("incidents.db", ""),
        ("incidents.db", "?mode=rwc"),
        ("incidents.db", "?mode=rwc&uri=true"),
        ("incidents.db", "?cache=private&nolock=0&psow=1"),
        ("incidents.db", "?check_same_thread=false"),
        ("file:{folder}/incidents.db", "?uri=true"),
        ("file:{folder}/incidents.db", "?mode=rwc&uri=true"),
        ("a b%20c#%25.db", "?mode=rwc"),
        ("file:%23.db", "?mode=rwc"),
    ],
)
async def test_a_parameter_of_sqlite_is_honored(tmp_path: Path, name: str, parameters: str) -> None:
    """Parameters reach SQLite, whether or not the URL says `uri=true`, and every path works."""
    name = name.format(folder=tmp_path)
    start_of_path = "" if name.startswith(f"file:{tmp_path}") else f"/{tmp_path}/"
    url = f"sqlite+aiosqlite:///{start_of_path.removeprefix('/')}{name}{parameters}"
    async with IncidentClient.open(url) as client:
        created = await client.create("Disk is full", source="monitoring")
    (created_file,) = (each for each in names(tmp_path) if each.endswith(".db"))
    with closing(sqlite3.connect(f"{tmp_path}/{created_file}")) as connection:
        assert connection.execute('SELECT count(*) FROM "Incident"').fetchone() == (1,)
    assert await migrate.current(url) == SCHEMA_REVISION
    async with IncidentClient.open(url) as client:
        assert await client.get(created.incident_id) == created


async def test_a_file_is_not_created_with_mode_rw(tmp_path: Path, path: Path) -> None:
    """`mode=rw` opens only a file that exists; `mode=ro` reads and refuses writes."""
    missing = tmp_path / "missing.db"
    with pytest.raises(StoreUnavailable, match="the file cannot be opened"):
        await IncidentClient.open(f"sqlite+aiosqlite:///{missing}?mode=rw").connect()
    assert names(tmp_path) == {path.name}
    async with IncidentClient.open(f"sqlite+aiosqlite:///{path}?mode=ro") as client:
        assert len(await client.list(limit=100)) == 100
        with pytest.raises(StoreUnavailable, match="the file is read-only") as caught:
            await client.create("Disk is full", source="monitoring")
        assert caught.value.place == str(path)


@pytest.fixture
def _open_umask() -> Iterator[None]:
    """Let new files be written by all users, unless they are created with another mode."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def readable_by_a_group(path: Path) -> None:
    """Let a group read the file."""
    path.chmod(0o640)


def modes(folder: Path) -> dict[str, int]:
    """Return the permissions of the files of databases in a folder."""
    return {file.name: file.stat().st_mode & 0o777 for file in folder.glob("*.db*")}


@each_way
@pytest.mark.usefixtures("_open_umask")
async def test_a_new_file_is_its_owners_alone(way: str, tmp_path: Path) -> None:
    """A file that a client creates, and the files beside it, can be read by no other user."""
    async with opened(way, tmp_path / "new.db") as client:
        await client.create("Disk is full", source="monitoring")
        # A host's engine does not use the write-ahead log unless its file does.
        beside = {"new.db-wal", "new.db-shm"} if way == "url" else set()
        assert modes(tmp_path) == dict.fromkeys({"new.db", *beside}, 0o600)


@pytest.mark.usefixtures("_open_umask")
def test_a_command_creates_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    """`db upgrade` creates a private file, also in the target of a symbolic link."""
    folder = tmp_path / "folder"
    folder.mkdir()
    link = tmp_path / "link.db"
    link.symlink_to(folder / "real.db")
    command = ("db", "upgrade", "--database-url", f"sqlite:///{link}?uri=true")
    assert outcome(start(*command))[0] == 0
    assert modes(folder) == {"real.db": 0o600}


@each_way
async def test_a_file_that_exists_keeps_its_mode(
    way: str, path: Path, readable_by_a_group: None
) -> None:
    """The mode that an operator gives to a file stays, and holds for the files beside it."""
    del readable_by_a_group
    async with opened(way, path) as client:
        await client.create("Disk is full", source="monitoring")
        assert set(modes(path.parent).values()) == {0o640}


def test_only_an_explicit_name_is_memory() -> None:
    """`:memory:` is a database in memory."""
    assert sqlite_url("sqlite+aiosqlite:///:memory:").database == IN_MEMORY


def test_every_code_of_sqlite_has_one_cause() -> None:
    """Each code of the table has its reason, also with the rest of an extended code."""
    texts = (
        WRITER_CHECK,
        "does not match any PRIMARY KEY or UNIQUE",
        'unsafe use of virtual table "x"',
        "no such table: x",
    )
    for cause in errors.CAUSES:
        for code in cause.codes:
            text = "no such table: x"
            if cause.text is not None:
                (text,) = filter(cause.text.search, texts)
            error = sqlite3.OperationalError(text)
            error.sqlite_errorname = code
            translated = errors.translate_error(error)
            assert type(translated) is cause.error
            assert (translated.sqlstate, translated.retryable) == (code, cause.retryable)
            if cause.error is not SchemaOutOfDate:
                assert translated.reason == cause.reason
    error = sqlite3.OperationalError("x")
    error.sqlite_errorname, error.sqlite_errorcode = "unknown", sqlite3.SQLITE_IOERR | 99 << 8
    assert errors.translate_error(error).sqlstate == "SQLITE_IOERR"
    error.sqlite_errorname = "SQLITE_MISUSE"
    assert "failed with sqlite3.OperationalError" in errors.translate_error(error).reason
