"""Several processes share the few server connections of a pooler, and each gets its own answers."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from attrs import asdict

from incidentkit import (
    IncidentClient,
    NewIncident,
    SourceName,
)
from incidentkit.store.schema import SCHEMA_REVISION
from incidentkit.store.sql.tables import incident_table
from tests.pooler.worker import Question, ask
from tests.programs import DEADLINE, outcome, start
from tests.test_migrations import ORIGIN_ROWS, ORIGIN_SCHEMA

if TYPE_CHECKING:
    from typing import Self

    from tests.servers import PgBouncer

logger = logging.getLogger("tests.pooler")

PROJECT = Path(__file__).parent.parent.parent

PROCESSES = 3
CALLS = 1000
"""Calls of each process."""

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon")
SOURCES: tuple[SourceName, ...] = ("operator", "monitoring")


def _questions() -> list[Question]:
    """Return questions whose statements differ, although many take the same parameters."""
    about_words = [
        Question("search", {"text": word, "order": order, "limit": limit})
        for word, order, limit in product(WORDS, ("newest", "oldest"), (5, 10))
    ]
    about_sources = [
        Question("search", {"status": "new", "source": source, "total": total, "order": order})
        for source, total, order in product(SOURCES, (True, False), ("newest", "oldest"))
    ]
    pages = [
        Question("list", {"status": "new", "source": source, "page": page})
        for source, page in product(SOURCES, (1, 2))
    ]
    single = [
        Question(verb, {"incident_id": number})
        for verb, number in product(("get", "history"), range(1, 11))
    ]
    return about_words + about_sources + pages + single


async def _answered(url: str) -> list[Question]:
    """Store incidents, and return questions with the answers to them."""
    questions = _questions()
    async with IncidentClient.open(url) as client:
        await client.create_many(
            NewIncident(f"{WORDS[number % 5]} is down", source=SOURCES[number % 2])
            for number in range(100)
        )
        for question in questions:
            question.answer = await ask(client, question)
    return questions


class Process:
    """A process that asks questions."""

    def __init__(self, url: str, seed: int, questions: list[Question]) -> None:
        self._program = subprocess.Popen(
            [sys.executable, "-m", "tests.pooler.worker", url, str(CALLS), str(seed)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._program.stdin is not None
        with self._program.stdin as asked:
            asked.write(json.dumps([asdict(question) for question in questions]))
        self._program.stdin = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._program:
            self._program.kill()

    def wait_until_open(self) -> None:
        """Wait until its client is open."""
        assert self._program.stdout is not None
        assert self._program.stdout.readline() == "open\n"

    def outcome(self) -> dict[str, Any]:
        """Wait for its end and return what it has counted."""
        out, _ = self._program.communicate(timeout=3 * DEADLINE)
        counted: dict[str, Any] = json.loads(out.removeprefix("open\n"))
        return counted


async def test_no_answer_belongs_to_another_process(
    pooler: PgBouncer, migrated_postgres_url: str
) -> None:
    """Each process gets the answers to its own questions, and none fails.

    The second and third process open while the first works.
    """
    questions = await _answered(migrated_postgres_url)
    url = pooler.through(migrated_postgres_url)
    with ExitStack() as running:
        first = running.enter_context(Process(url, 0, questions))
        first.wait_until_open()
        others = [Process(url, seed, questions) for seed in range(1, PROCESSES)]
        for process in others:
            running.enter_context(process)
        outcomes = [process.outcome() for process in (first, *others)]
    calls, wrong = (sum(each[name] for each in outcomes) for name in ("calls", "wrong"))
    failures = [message for each in outcomes for message in each["failures"]]
    logger.info(
        "%d processes, %d calls, %d failures, %d wrong answers",
        *(PROCESSES, calls, sum(sum(each["failures"].values()) for each in outcomes), wrong),
    )
    assert not failures
    assert not wrong
    assert calls > PROCESSES * CALLS


async def test_the_schema_is_migrated_through_a_pooler(
    pooler: PgBouncer, empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every `db` command works while other processes migrate the database, and Alembic's own."""
    url = pooler.through(empty_postgres_url)

    def db(command: str, *arguments: str) -> subprocess.Popen[bytes]:
        return start("db", command, "--database-url", url, *arguments)

    assert outcome(db("current"))[0] == 0
    upgrades = [db("upgrade") for _ in range(PROCESSES)]
    assert {outcome(upgrade)[:2] for upgrade in upgrades} == {(0, f"{SCHEMA_REVISION} (head)\n")}
    assert outcome(db("check")) == (0, "The schema is up to date.\n", "")
    assert outcome(db("downgrade"))[0] == 0
    assert outcome(db("check"))[0] == 1
    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", url)
    ini = str(PROJECT / "alembic.ini")
    assert outcome(start("-c", ini, "upgrade", "head", program=("-m", "alembic")))[0] == 0
    async with IncidentClient.open(url) as incidents:
        await incidents.create("The disk is full", source="operator")


async def test_indexes_are_built_through_a_pooler(
    pooler: PgBouncer, empty_postgres_url: str
) -> None:
    """A table with rows is indexed outside a transaction, and other upgrades wait for that."""
    connection = await asyncpg.connect(empty_postgres_url)
    await connection.execute(ORIGIN_SCHEMA + ORIGIN_ROWS)
    url = pooler.through(empty_postgres_url)
    upgrades = [start("db", "upgrade", "--database-url", url) for _ in range(2)]
    assert {outcome(upgrade)[:2] for upgrade in upgrades} == {(0, f"{SCHEMA_REVISION} (head)\n")}
    valid = await connection.fetch(
        "SELECT indexrelid::regclass::text AS name, indisvalid FROM pg_index "
        """WHERE indrelid = '"Incident"'::regclass AND NOT indisprimary"""
    )
    await connection.close()
    declared = {str(index.name) for index in incident_table.indexes}
    assert {row["name"].strip('"'): row["indisvalid"] for row in valid}.items() >= {
        (name, True) for name in declared
    }
    assert all(row["indisvalid"] for row in valid)


async def test_no_statement_of_a_migration_has_a_name(
    transaction_pooler: PgBouncer, empty_postgres_url: str
) -> None:
    """The server connections keep no prepared statement after a migration."""
    url = transaction_pooler.through(empty_postgres_url)
    assert outcome(start("db", "upgrade", "--database-url", url))[0] == 0
    connection = await asyncpg.connect(url, statement_cache_size=0)
    kept = await connection.fetch("SELECT name FROM pg_prepared_statements")
    await connection.close()
    assert not kept
