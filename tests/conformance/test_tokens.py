"""Access tokens."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import InvalidIncident, Scope, TokenNotFound
from incidentkit.domain import tokens
from tests.conformance.concurrency import run_all
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused

if TYPE_CHECKING:
    from tests.conformance.embodiments import Embodiment, Verbs

pytestmark = needs(Need.TOKENS)


async def test_a_token_is_created_listed_and_revoked(incidents: Verbs) -> None:
    """The secret is shown once, by what is created; the list has everything else."""
    created = await incidents.tokens.create(
        "ci", ["report", Scope.READ], expires_in=timedelta(minutes=15)
    )
    await incidents.tokens.create("board", "read")
    first, second = await incidents.tokens.list()
    assert first == created.token
    assert (first.name, sorted(first.scopes)) == ("ci", [Scope.READ, Scope.REPORT])
    assert first.expires_at == first.created_at + timedelta(minutes=15)
    assert (second.name, second.expires_at, second.last_used_at) == ("board", None, None)
    now = datetime.now(UTC)
    assert first.active(now)
    assert not first.active(now + timedelta(minutes=15))
    revoked = await incidents.tokens.revoke("ci")
    assert revoked.revoked_at is not None
    assert not revoked.active(now)
    assert await incidents.tokens.list() == [revoked, second]
    for name in ("ci", "unknown"):
        with pytest.raises(TokenNotFound, match=f"No active token is named {name}"):
            await incidents.tokens.revoke(name)


async def test_only_the_digest_of_a_token_finds_it(incidents: Verbs) -> None:
    """The secret is neither stored nor part of a `repr`."""
    assert not await incidents.tokens.any()
    created = await incidents.tokens.create("ci", "read")
    assert tokens.is_token(created.secret)
    assert created.secret not in repr(created)
    assert created.secret[3:] not in repr(await incidents.tokens.list())
    digest = tokens.digest(created.secret)
    assert await incidents.tokens.find(digest) == (digest, created.token)
    assert await incidents.tokens.find(tokens.digest(created.secret[::-1])) is None
    await incidents.tokens.revoke("ci")
    assert await incidents.tokens.any()


async def test_an_active_token_keeps_its_name(incidents: Verbs) -> None:
    """A name is free again once its token was revoked or has expired."""
    await incidents.tokens.create("ci", "read")
    with pytest.raises(InvalidIncident, match="name belongs to an active token"):
        await incidents.tokens.create("ci", "write")
    await incidents.tokens.revoke("ci")
    await incidents.tokens.create("ci", "write", expires_in=timedelta(days=3650))
    assert len(await incidents.tokens.list()) == 2


@needs(Need.OUTSIDE_SQL)
async def test_an_expired_token_frees_its_name(incidents: Verbs, embodiment: Embodiment) -> None:
    """A new token takes the name of an expired one, which can no longer be revoked."""
    await incidents.tokens.create("ci", "read", expires_in=timedelta(hours=1))
    at = embodiment.moment(datetime.now(UTC) - timedelta(seconds=1))
    await embodiment.sql(f"UPDATE incident_access_token SET expires_at = {at}")
    with pytest.raises(TokenNotFound):
        await incidents.tokens.revoke("ci")
    new = (await incidents.tokens.create("ci", "read")).token
    old, listed = await incidents.tokens.list()
    assert listed == new
    assert old.revoked_at == old.expires_at
    await embodiment.sql(
        "UPDATE incident_access_token SET scopes = 'fly,read' WHERE access_token_id = 2"
    )
    # A scope of a newer version allows nothing here.
    assert (await incidents.tokens.list())[1].scopes == {Scope.READ}


@needs(Need.OTHER_CLIENT)
async def test_one_of_two_tokens_with_a_name_is_created(incidents: Verbs, other: Verbs) -> None:
    """Of concurrent creates with one name, one succeeds, and the others are refused by the rule."""
    outcomes = await run_all(
        *(_outcome(client.tokens.create("ci", "read")) for client in (incidents, other) * 4)
    )
    assert sorted(outcomes) == ["", *["name belongs to an active token"] * 7]
    assert len(await other.tokens.list()) == 1


async def _outcome(call: Any) -> str:
    try:
        await call
    except InvalidIncident as error:
        return str(error).partition(":")[0]
    return ""


async def test_the_use_of_a_token_is_recorded_to_the_hour(incidents: Verbs) -> None:
    """A use within an hour of the recorded one is not written."""
    token = (await incidents.tokens.create("ci", "read")).token
    now = datetime.now(UTC).replace(microsecond=0)
    for minutes, recorded in ((0, 0), (59, 0), (61, 61)):
        await incidents.tokens.mark_used(token, now + timedelta(minutes=minutes))
        (token,) = await incidents.tokens.list()
        assert token.last_used_at == now + timedelta(minutes=recorded)


async def test_faulty_tokens_are_refused(incidents: Verbs) -> None:
    """Every faulty argument is named, and nothing is created."""
    wrong: tuple[Any, ...] = ("", "a" * 65, "a b", "a/b", "-a", "é", "a\n", None, 7)
    for name in wrong:
        assert await refused(incidents.tokens.create(name, "read")) == ["name"]
        assert await refused(incidents.tokens.revoke(name)) == ["name"]
    for scopes in ((), "", "fly", ["read", "fly"], None, [None]):
        given: Any = scopes
        assert await refused(incidents.tokens.create("a", given)) == ["scopes"]
    lifetimes: tuple[Any, ...] = (timedelta(0), timedelta(-1), timedelta(days=3651), 90, "90d")
    for expires_in in lifetimes:
        call = incidents.tokens.create("/", "read", expires_in=expires_in)
        assert await refused(call) == ["name", "expires_in"]
    assert await incidents.tokens.list() == []
