"""A cached page is served only while the database has its token."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incidentkit import Incident, IncidentSource, IncidentStatus, ListQuery, StoreUnavailable
from incidentkit.cache import MemoryCache
from incidentkit.cache.pages import PageCache, seal, unseal
from incidentkit.store.page import Page
from tests.test_breaker import Clock, FaultyCache

QUERY = ListQuery()
OTHER = ListQuery(page=2)
KEY = QUERY.cache_key


class Source:
    """A store with one incident, whose message counts the changes."""

    def __init__(self) -> None:
        self.changes = 0
        self.null = False
        self.fails = False
        self.asked: list[str] = []

    def page(self) -> list[Incident]:
        """Return the correct list."""
        message = f"Changed {self.changes} times"
        status, source = IncidentStatus.NEW, IncidentSource.PARTNER
        return [Incident(1, message, status, source, datetime(2026, 1, 1, tzinfo=UTC))]

    async def token(self) -> str | None:
        """Return the current token."""
        self.asked.append("token")
        if self.fails:
            raise StoreUnavailable("it is away")
        return None if self.null else f"token-{self.changes}"

    async def list(self, query: ListQuery) -> Page:  # noqa: ARG002
        """Return the page with its token."""
        self.asked.append("list")
        if self.fails:
            raise StoreUnavailable("it is away")
        return Page(self.page(), None if self.null else f"token-{self.changes}")


@pytest.fixture
def source() -> Source:
    """The store that pages are read from."""
    return Source()


@pytest.fixture
def shared() -> FaultyCache:
    """A cache that several processes share."""
    return FaultyCache()


@pytest.fixture
def pages(source: Source, shared: FaultyCache) -> PageCache:
    """The pages of one process."""
    return PageCache(source, shared)


async def test_a_page_of_the_process_costs_one_token(
    pages: PageCache, source: Source, shared: FaultyCache
) -> None:
    """Once a page is cached, each list costs one read of the token."""
    assert await pages.list(QUERY) == source.page()
    await pages.finish()
    source.asked.clear()
    shared.calls.clear()
    for _ in range(3):
        assert await pages.list(QUERY) == source.page()
    assert source.asked == ["token"] * 3
    assert shared.calls == []


async def test_a_page_of_another_process_costs_one_token(
    pages: PageCache, source: Source, shared: FaultyCache
) -> None:
    """A page stored by another process is served for one read of the token, and kept locally."""
    other = PageCache(source, shared)
    await other.list(QUERY)
    await other.finish()
    source.asked.clear()
    assert await pages.list(QUERY) == source.page()
    await shared.clear()
    assert await pages.list(QUERY) == source.page()
    assert source.asked == ["token", "token"]


async def test_a_page_that_nobody_has_costs_one_read(source: Source) -> None:
    """Without a cached page, a list costs one read of the page and no read of the token."""
    pages = PageCache(source)
    await pages.list(QUERY)
    assert source.asked == ["list"]


async def test_a_change_by_anybody_shows_in_the_next_list(pages: PageCache, source: Source) -> None:
    """A changed token makes every older page a miss, without a clear."""
    for _ in range(3):
        assert await pages.list(QUERY) == source.page()
        assert await pages.list(OTHER) == source.page()
        source.changes += 1


async def test_a_late_page_is_never_served(
    pages: PageCache, source: Source, shared: FaultyCache
) -> None:
    """A page read before a change but stored after it is a miss."""
    await pages.list(QUERY)
    await pages.finish()
    late = await shared.get(KEY)
    assert late is not None
    source.changes += 1
    await shared.set(KEY, late, 10)
    assert await pages.list(QUERY) == source.page()
    assert await PageCache(source, shared).list(QUERY) == source.page()


async def test_a_page_under_another_key_is_never_served(
    pages: PageCache, source: Source, shared: FaultyCache
) -> None:
    """A value with another key is a miss, even if its token is current."""
    wrong = seal(OTHER.cache_key, str(await source.token()), b"[]")
    await shared.set(KEY, wrong, 10)
    assert await pages.list(QUERY) == source.page()


async def test_a_forged_page_is_never_served(source: Source, shared: FaultyCache) -> None:
    """A genuine value that was changed anywhere, cut or extended is a miss."""
    genuine = await _stored_value(source, shared)
    flipped = [
        genuine[:place] + bytes([genuine[place] ^ 1]) + genuine[place + 1 :]
        for place in range(len(genuine))
    ]
    for value in (*flipped, *(genuine[:size] for size in range(len(genuine)))):
        assert unseal(value, KEY, await source.token()) is None
    forged = [
        genuine + b" ",
        b" " + genuine,
        genuine.replace(b"incidents", b"incident_s"),
        genuine[: genuine.index(b"[")] + b"[]}",
        genuine[: genuine.index(b'"incidents"')] + b'"incidents":[],' + genuine[-100:],
    ]
    for value in forged:
        assert unseal(value, KEY, await source.token()) is None
        await shared.set(KEY, value, 10)
        source.asked.clear()
        pages = PageCache(source, shared)
        assert await pages.list(QUERY) == source.page()
        assert "list" in source.asked
        await pages.finish()
    source.asked.clear()
    await shared.set(KEY, genuine, 10)
    assert await PageCache(source, shared).list(QUERY) == source.page()
    assert source.asked == ["token"]


@given(key=st.text(), other=st.text(), token=st.text(), page=st.binary(), changed=st.binary())
def test_a_proof_fits_one_key_one_token_and_one_page(
    key: str, other: str, token: str, page: bytes, changed: bytes
) -> None:
    """A page comes out as it was put in, with its own key and token alone."""
    sealed = seal(key, token, page)
    assert unseal(sealed, key, token) == page
    if other not in (key, token):
        assert unseal(sealed, other, token) is None
        assert unseal(sealed, key, other) is None
    if changed != page:
        assert unseal(sealed.replace(b":" + page + b"}", b":" + changed + b"}"), key, token) is None


async def test_a_shared_cache_never_learns_the_token(source: Source, shared: FaultyCache) -> None:
    """No value holds the token in any encoding, so a reader of the cache cannot make a proof."""
    value = await _stored_value(source, shared)
    token = str(await source.token()).encode()
    for encoded in (token, token.hex().encode(), b64encode(token).rstrip(b"=")[:-1]):
        assert encoded not in value


async def test_a_page_of_the_version_before_is_never_served(
    source: Source, shared: FaultyCache
) -> None:
    """A value that holds the token itself, as earlier versions stored it, is a miss."""
    head = f'{{"key":"{KEY}","token":"{await source.token()}","incidents":'
    await shared.set(KEY, head.encode() + b"[]}", 10)
    pages = PageCache(source, shared)
    assert await pages.list(QUERY) == source.page()
    await pages.finish()
    value = await shared.get(KEY)
    assert value is not None
    assert value.startswith(b'{"proof":"')


async def test_an_old_page_is_served_only_while_its_token_is_back(
    source: Source, shared: FaultyCache
) -> None:
    """A replayed page is a miss after a change, and the true page after a database went back."""
    old, page = await _stored_value(source, shared), source.page()
    source.changes += 1
    await shared.set(KEY, old, 10)
    pages = PageCache(source, shared)
    assert await pages.list(QUERY) == source.page() != page
    await pages.finish()
    source.changes -= 1
    await shared.set(KEY, old, 10)
    source.asked.clear()
    assert await PageCache(source, shared).list(QUERY) == source.page() == page
    assert source.asked == ["token"]


async def _stored_value(source: Source, shared: FaultyCache) -> bytes:
    """Return the value that a process stores for the current page."""
    pages = PageCache(source, shared)
    await pages.list(QUERY)
    await pages.finish()
    value = await shared.get(KEY)
    assert value is not None
    return value


async def test_a_null_token_matches_nothing(
    pages: PageCache, source: Source, shared: FaultyCache
) -> None:
    """While the token is unknown, each list is read from the database."""
    source.null = True
    for _ in range(3):
        assert await pages.list(QUERY) == source.page()
        source.changes += 1
    # The page that tells that there is no token could have been shared.
    assert source.asked.count("list") == 4
    for token in ("", "None", "null"):
        sealed = seal(KEY, token, b"[]")
        await shared.set(KEY, sealed, 10)
        assert await pages.list(QUERY) == source.page()
        assert unseal(sealed, KEY, None) is None


async def test_without_a_token_no_list_shares_a_page(pages: PageCache, source: Source) -> None:
    """While the token is unknown, each of concurrent lists reads its own page; later they share."""
    source.null = True
    await asyncio.gather(*(pages.list(QUERY) for _ in range(5)))
    source.asked.clear()
    await asyncio.gather(*(pages.list(QUERY) for _ in range(5)))
    assert source.asked == ["list"] * 5
    source.null = False
    await pages.list(QUERY)
    source.asked.clear()
    await asyncio.gather(*(pages.list(QUERY) for _ in range(5)))
    assert source.asked.count("list") == 1


async def test_concurrent_lists_share_a_token_and_a_page(pages: PageCache, source: Source) -> None:
    """Concurrent lists share one read of the page or the token; each gets its own copy."""
    first, *others = await asyncio.gather(*(pages.list(QUERY) for _ in range(50)))
    assert source.asked.count("list") == 1
    first.clear()
    assert others == [source.page()] * 49
    await pages.list(OTHER)
    source.asked.clear()
    await asyncio.gather(*(pages.list(query) for query in (QUERY, OTHER) * 20))
    assert source.asked == ["token"]


async def test_a_list_does_not_join_one_under_way() -> None:
    """A list that starts after a change shows it, even while an older one is being read."""
    proceed = asyncio.Event()

    class SlowSource(Source):
        async def list(self, query: ListQuery) -> Page:
            page = await super().list(query)
            await proceed.wait()
            return page

    source = SlowSource()
    pages = PageCache(source)
    before = source.page()
    early = asyncio.ensure_future(pages.list(QUERY))
    for _ in range(4):
        await asyncio.sleep(0)
    assert source.asked == ["list"]
    source.changes += 1
    late = asyncio.ensure_future(pages.list(QUERY))
    await asyncio.sleep(0)
    proceed.set()
    assert await early == before
    assert await late == source.page()


async def test_max_staleness_is_the_age_of_a_token(source: Source) -> None:
    """A token is trusted for `max_staleness` seconds from the start of its read."""
    clock = Clock()
    pages = PageCache(source, max_staleness=10, clock=clock)
    before = await pages.list(QUERY)
    source.changes += 1
    clock.now = 9
    assert await pages.list(QUERY) == before
    assert source.asked == ["list"]
    # Reading a page yields a newer token, which makes the older page a miss.
    assert await pages.list(OTHER) == source.page()
    assert await pages.list(QUERY) == source.page()
    assert source.asked == ["list"] * 3
    source.changes += 1
    clock.now = 18
    assert await pages.list(QUERY) != source.page()
    clock.now = 19
    assert await pages.list(QUERY) == source.page()


async def test_max_staleness_does_not_hide_ones_own_changes(source: Source) -> None:
    """After a change by this process no older token is trusted, not even one still being read."""
    proceed = asyncio.Event()

    class SlowSource(Source):
        async def token(self) -> str | None:
            token = await source.token()
            await proceed.wait()
            return token

        async def list(self, query: ListQuery) -> Page:
            return await source.list(query)

    clock = Clock()
    pages = PageCache(SlowSource(), max_staleness=10, clock=clock)
    await pages.list(QUERY)
    clock.now = 20
    reading = asyncio.ensure_future(pages.list(QUERY))
    for _ in range(4):
        await asyncio.sleep(0)
    assert source.asked == ["list", "token"]
    source.changes += 1
    pages.forget()
    proceed.set()
    await reading
    assert await pages.list(QUERY) == source.page()


async def test_a_write_removes_the_pages(pages: PageCache, shared: FaultyCache) -> None:
    """A change by this process clears the shared cache."""
    await pages.list(QUERY)
    await pages.list(OTHER)
    await pages.finish()
    pages.forget()
    await pages.finish()
    assert await shared.get(KEY) is None
    assert await shared.get(OTHER.cache_key) is None


async def test_a_page_from_before_a_write_is_not_kept(
    pages: PageCache, shared: FaultyCache
) -> None:
    """A page from before a change by this process is not written to the shared cache."""
    await pages.list(QUERY)
    await pages.list(OTHER)  # Deferred by the pause after the first write.
    pages.forget()
    await pages.finish()
    assert shared.calls.count("set") == 1
    await pages.list(OTHER)
    await pages.finish()
    assert shared.calls.count("set") == 2


async def test_concurrent_writes_share_a_clear(pages: PageCache, shared: FaultyCache) -> None:
    """Concurrent changes share one clear."""
    for _ in range(50):
        pages.forget()
    await pages.finish()
    assert shared.calls == ["clear"]


@pytest.mark.parametrize("fault", ["fails", "hangs"])
async def test_a_faulty_shared_cache_changes_no_answer(
    pages: PageCache, source: Source, shared: FaultyCache, fault: str
) -> None:
    """While the shared cache fails or hangs, lists stay correct and local pages are served."""
    setattr(shared, fault, True)
    for _ in range(3):
        assert await pages.list(QUERY) == source.page()
        pages.forget()
        source.changes += 1
    assert pages.available is False
    await pages.list(QUERY)
    source.asked.clear()
    await pages.list(QUERY)
    assert source.asked == ["token"]


async def test_a_database_that_is_away_is_told(pages: PageCache, source: Source) -> None:
    """While the database is away, a list fails even if its page is cached."""
    await pages.list(QUERY)
    source.fails = True
    with pytest.raises(StoreUnavailable):
        await pages.list(QUERY)
    with pytest.raises(StoreUnavailable):
        await pages.list(OTHER)


async def test_a_cancelled_list_leaves_the_others(pages: PageCache, source: Source) -> None:
    """A cancelled caller does not affect the others that share its read."""
    calls = [asyncio.ensure_future(pages.list(QUERY)) for _ in range(3)]
    await asyncio.sleep(0)
    calls[0].cancel()
    assert await asyncio.gather(*calls[1:]) == [source.page()] * 2


async def test_a_read_that_no_call_waits_for_is_cancelled(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page is read as long as one of the calls that share the read waits, and no longer."""
    begun, cancelled, gate = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def read(_: ListQuery) -> Page:
        begun.set()
        try:
            await gate.wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return Page(source.page(), "token-0")

    monkeypatch.setattr(source, "list", read)
    pages = PageCache(source)
    *gone, last = (asyncio.ensure_future(pages.list(QUERY)) for _ in range(3))
    await begun.wait()
    for call in gone:
        call.cancel()
    await asyncio.wait(gone)
    assert not cancelled.is_set()
    gate.set()
    assert await last == source.page()
    gate.clear()
    begun.clear()
    calls = [asyncio.ensure_future(pages.list(OTHER)) for _ in range(3)]
    await begun.wait()
    for call in calls:
        call.cancel()
    async with asyncio.timeout(60):
        await cancelled.wait()
    gate.set()
    assert await pages.list(OTHER) == source.page()


async def test_without_a_shared_cache_there_is_no_availability(source: Source) -> None:
    """Without a shared cache, pings succeed and `available` is None."""
    pages = PageCache(source)
    await pages.ping()
    await pages.probe()
    assert pages.available is None
    assert PageCache(source, MemoryCache()).available is True
