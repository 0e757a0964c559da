"""The types of the client's methods, and the calls that a type checker must reject."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, assert_type

from incidentkit import (
    ChangePage,
    FeedBlocker,
    Incident,
    IncidentClient,
    IncidentEvent,
    IncidentOrder,
    Incidents,
    IncidentSource,
    IncidentStatus,
    JoinedIncidents,
    NewIncident,
    SearchPage,
    SyncIncidentClient,
    SyncIncidents,
    SyncJoinedIncidents,
    acting_as,
)
from incidentkit.cache import MemoryCache
from incidentkit.opening import store_from_url
from incidentkit.store.options import StoreOptions

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    import psycopg
    from asyncpg import Pool, Record
    from django.db.backends.base.base import BaseDatabaseWrapper
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
    from sqlalchemy.orm import Session

    from incidentkit.cache import IncidentCache
    from incidentkit.cache.redis import RedisCache
    from incidentkit.store.ports import IncidentStore, StoreOperations
    from incidentkit.store.records import Records
    from incidentkit.store.store import Store


class OwnClient(IncidentClient):
    """A host's subclass of the client."""


class OwnCache:
    """A host's own cache."""

    async def get(self, key: str) -> bytes | None:
        """Return the key as a stand-in for a value."""
        return key.encode()

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep nothing."""

    async def clear(self) -> None:
        """Forget nothing."""

    async def ping(self) -> None:
        """Answer."""

    async def close(self) -> None:
        """Close nothing."""


class HalfACache:
    """An incomplete cache that only has `get`."""

    async def get(self, key: str) -> bytes | None:
        """Return the key as a stand-in for a value."""
        return key.encode()


async def created(incidents: IncidentClient) -> None:
    """`create` takes a message and a source, or a NewIncident alone."""
    assert_type(await incidents.create("Disk is full", source="monitoring"), Incident)
    assert_type(await incidents.create("Disk is full", source=IncidentSource.PARTNER), Incident)
    assert_type(
        await incidents.create("Disk is full", source="partner", incident_type="failed"), Incident
    )
    assert_type(
        await incidents.create(
            "Disk is full", source="partner", incident_type=IncidentStatus.COMPLETED
        ),
        Incident,
    )
    assert_type(await incidents.create(NewIncident("Disk is full", "operator")), Incident)


async def not_created(incidents: IncidentClient, new: NewIncident) -> None:
    """A message needs a source as a keyword; a NewIncident takes no other arguments."""
    await incidents.create()  # type: ignore[call-overload]
    await incidents.create("Disk is full")  # type: ignore[call-overload]
    await incidents.create("Disk is full", "operator")  # type: ignore[call-overload]
    await incidents.create("Disk is full", source=None)  # type: ignore[call-overload]
    await incidents.create(b"Disk is full", source="operator")  # type: ignore[call-overload]
    await incidents.create(new, source="operator")  # type: ignore[call-overload]
    await incidents.create("Disk is full", source="operator", status="new")  # type: ignore[call-overload]


async def listed(incidents: IncidentClient) -> None:
    """Every argument of a list is optional; filters are members, strings or None."""
    assert_type(await incidents.list(), list[Incident])
    assert_type(await incidents.list(2, 50), list[Incident])
    assert_type(await incidents.list(page=1, limit=10, status="new", source=None), list[Incident])
    assert_type(
        await incidents.list(status=IncidentStatus.NEW, source=IncidentSource.PARTNER),
        list[Incident],
    )
    await incidents.list(page="1")  # type: ignore[arg-type]
    await incidents.list(limit=None)  # type: ignore[arg-type]
    await incidents.list(status=1)  # type: ignore[arg-type]
    await incidents.list(offset=10)  # type: ignore[call-arg]


async def read_and_changed(incidents: IncidentClient) -> None:
    """Reading and changing return an incident, never None."""
    assert_type(await incidents.get(7), Incident)
    assert_type(await incidents.update_status(7, "completed"), Incident)
    assert_type(await incidents.update_status(7, IncidentStatus.FAILED), Incident)
    assert_type(await incidents.resolve("disk", status="failed"), Incident | None)
    assert_type(await incidents.resolve_many({"disk"}), list[Incident | None])
    await incidents.get("7")  # type: ignore[arg-type]
    await incidents.update_status(7, None)  # type: ignore[arg-type]
    await incidents.update_status(7)  # type: ignore[call-arg]


async def misspelled(incidents: Incidents, blocking: SyncIncidents, status: str) -> None:
    """A checker reports a text that is no status, source or order, in every verb."""
    await incidents.create("Disk is full", source="customer")  # type: ignore[call-overload]
    await incidents.create("Disk is full", source="partner", incident_type="open")  # type: ignore[call-overload]
    await incidents.update_status(7, "closed")  # type: ignore[arg-type]
    await incidents.update_status(7, status)  # type: ignore[arg-type]
    await incidents.list(status="open")  # type: ignore[arg-type]
    await incidents.list(source="customer")  # type: ignore[arg-type]
    await incidents.search(status=["new", "open"])  # type: ignore[list-item]
    await incidents.search(source="customer")  # type: ignore[arg-type]
    await incidents.search(order="random")  # type: ignore[arg-type]
    incidents.iterate(order="random")  # type: ignore[arg-type]
    blocking.create("Disk is full", source="customer")  # type: ignore[call-overload]
    blocking.update_status(7, "closed")  # type: ignore[arg-type]
    blocking.list(status="open")  # type: ignore[arg-type]
    blocking.search(source={"customer"})  # type: ignore[arg-type]
    blocking.iterate(order="random")  # type: ignore[arg-type]


async def followed(incidents: IncidentClient) -> None:
    """Histories, searches and changes return their models; a cursor is a string or None."""
    assert_type(await incidents.history(7), list[IncidentEvent])
    assert_type(await incidents.note(7, "Mended"), IncidentEvent)
    assert_type(await incidents.search(status={"new"}, source="partner", total=True), SearchPage)
    page = await incidents.search(status=[IncidentStatus.NEW], order=IncidentOrder.OLDEST)
    assert_type(page.next, str | None)
    async for incident in incidents.iterate(text="disk"):
        assert_type(incident, Incident)
    async for change in incidents.changes(after="latest"):
        assert_type(change, IncidentEvent)
    assert_type(await incidents.feed_blocker(), FeedBlocker | None)
    assert_type(await incidents.read_changes(wait=1.5), ChangePage)
    assert_type(await incidents.purge(datetime.now(UTC)), int)
    assert_type(await incidents.purgeable(datetime.now(UTC)), int)
    with acting_as("alice"):
        assert_type(
            await incidents.create(
                "Disk is full", source="partner", dedup_key="disk", idempotency_key="k"
            ),
            Incident,
        )
    await incidents.note(7)  # type: ignore[call-arg]
    await incidents.search("new")  # type: ignore[call-arg]
    await incidents.update_status(7, "new", "a note")  # type: ignore[call-arg]
    await incidents.purge("90d")  # type: ignore[arg-type]


async def joined(
    incidents: IncidentClient, session: AsyncSession, engine: AsyncEngine, pool: Pool[Record]
) -> None:
    """Joined incidents have the client's verbs, but neither its feed nor its lifecycle."""
    incidents.join(7)  # type: ignore[arg-type]
    incidents.join(engine)  # type: ignore[arg-type]
    incidents.join(pool)  # type: ignore[arg-type]
    async with engine.connect() as connection, pool.acquire() as acquired:
        assert_type(incidents.join(connection), JoinedIncidents)
        assert_type(incidents.join(acquired), JoinedIncidents)
    inside = incidents.join(session)
    assert_type(inside, JoinedIncidents)
    assert_type(await inside.create("Disk is full", source="partner"), Incident)
    assert_type(await inside.list(), list[Incident])
    assert_type(await inside.search(), SearchPage)
    inside.changes()  # type: ignore[attr-defined]
    await inside.close()  # type: ignore[attr-defined]
    assert_type(IncidentClient.open(engine, transitions={"new": ["failed"]}), IncidentClient)
    IncidentClient.open(session)  # type: ignore[arg-type]


def called_without_an_event_loop(incidents: SyncIncidentClient) -> None:
    """The synchronous verbs return what the asynchronous ones return when they are awaited."""
    assert_type(incidents.create("Disk is full", source="monitoring"), Incident)
    incidents.create("Disk is full")  # type: ignore[call-overload]
    assert_type(incidents.list(), list[Incident])
    assert_type(incidents.search().incidents, list[Incident])
    assert_type(next(incidents.changes()), IncidentEvent)
    assert_type(next(incidents.iterate()), Incident)
    assert_type(incidents.resolve("disk"), Incident | None)
    with SyncIncidentClient.open() as opened:
        assert_type(opened, SyncIncidentClient)


def joined_without_an_event_loop(
    incidents: SyncIncidentClient,
    *,
    session: Session,
    connection: Connection,
    of_psycopg: psycopg.Connection[dict[str, str]],
    of_sqlite: sqlite3.Connection,
    of_django: BaseDatabaseWrapper,
    asynchronous: AsyncSession,
) -> None:
    """A synchronous client names the connections that it joins."""
    inside = incidents.join(session)
    assert_type(inside, SyncJoinedIncidents)
    assert_type(inside.create("Disk is full", source="partner"), Incident)
    for other in (connection, of_psycopg, of_sqlite, of_django):
        incidents.join(other)
    inside.changes()  # type: ignore[attr-defined]
    incidents.join(asynchronous)  # type: ignore[arg-type]
    incidents.join("shop.db")  # type: ignore[arg-type]


async def opened(path: Path) -> None:
    """A client is opened with `async with`, and a subclass keeps its type."""
    async with IncidentClient.open() as incidents:
        assert_type(incidents, IncidentClient)
    async with IncidentClient.from_env(path) as incidents:
        assert_type(incidents, IncidentClient)
    async with OwnClient.from_env(None) as own:
        assert_type(own, OwnClient)
    client = OwnClient.open(
        "sqlite+aiosqlite:///:memory:",
        "redis://cache",
        redis_required=True,
        options=StoreOptions(pool_size=2),
    )
    assert_type(client, OwnClient)
    assert_type(client.connected, bool)
    assert_type(client.cache_available, bool | None)
    with IncidentClient.open():  # type: ignore[attr-defined]
        pass
    IncidentClient.open(redis="redis://cache")  # type: ignore[call-arg]


def made_of_parts(memory: MemoryCache, redis: RedisCache) -> None:
    """A client accepts only stores and caches that implement the protocols."""
    store = store_from_url("sqlite://")
    IncidentClient(store)
    IncidentClient(store, cache=memory)
    IncidentClient(store, cache=redis, cache_required=True)
    IncidentClient(store, cache=OwnCache())
    IncidentClient(store, cache=None)
    IncidentClient()  # type: ignore[call-arg]
    IncidentClient("sqlite://")  # type: ignore[arg-type]
    IncidentClient(store, cache=HalfACache())  # type: ignore[arg-type]
    IncidentClient(store, memory)  # type: ignore[call-arg]


def kept_protocols(store: Store, records: Records, redis: RedisCache) -> None:
    """The built-in stores and caches implement the protocols."""
    stores: list[IncidentStore] = [store]
    operations: list[StoreOperations] = [store, records]
    caches: list[IncidentCache] = [redis, MemoryCache(max_bytes=1)]
    del stores, operations, caches
