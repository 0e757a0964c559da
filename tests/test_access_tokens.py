"""The format of access tokens, and what their creation leaves in the log."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import TYPE_CHECKING
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incidentkit import ClientClosed, IncidentClient, StoreError
from incidentkit.domain import tokens
from incidentkit.store.access_tokens import AccessTokens

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

MEMORY = "sqlite+aiosqlite:///:memory:"


def test_a_token_has_the_documented_format() -> None:
    """`ik_`, 43 random digits of base 62, and 6 of the CRC32 of everything before."""
    made = [tokens.new_secret() for _ in range(300)]
    assert len(set(made)) == 300
    for secret in made:
        assert re.fullmatch(r"ik_[0-9A-Za-z]{49}", secret)
        assert tokens.is_token(secret)
        value = 0
        for digit in secret[-6:]:
            value = 62 * value + tokens.ALPHABET.index(digit)
        assert value == crc32(secret[:-6].encode())
    counts = Counter("".join(secret[3:-6] for secret in made))
    assert set(counts) == set(tokens.ALPHABET)


@given(st.integers(0, 51), st.sampled_from(tokens.ALPHABET))
def test_a_typo_is_refused_without_the_database(place: int, typed: str) -> None:
    """Another character at any place breaks the prefix or the checksum."""
    secret = "ik_" + "aB3" * 14 + "z"
    secret += tokens._checksum(secret)
    assert tokens.is_token(secret)
    mistyped = secret[:place] + typed + secret[place + 1 :]
    assert tokens.is_token(mistyped) is (mistyped == secret)


@pytest.mark.parametrize("text", ["", "ik_", "ik_" + "a" * 48, "ik_" + "a" * 50, "ik_" + "é" * 49])
def test_other_texts_are_no_tokens(text: str) -> None:
    """A text of another length or alphabet is refused."""
    assert not tokens.is_token(text)


async def test_creation_and_revocation_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The log has the id and the name of a token, never its secret."""
    caplog.set_level(logging.INFO, "incidentkit")
    async with IncidentClient.open(MEMORY) as incidents:
        created = await incidents.tokens.create("ci", ["report", "read"])
        await incidents.tokens.revoke("ci")
    logged = [record.getMessage() for record in caplog.records]
    assert logged[-2:] == ["Token 1 created: ci (read, report)", "Token 1 revoked: ci"]
    assert created.secret not in caplog.text


async def test_tokens_need_an_open_client() -> None:
    """Every call raises ClientClosed before the client is open and after it is closed."""
    incidents = IncidentClient.open(MEMORY)
    for _ in range(2):
        with pytest.raises(ClientClosed):
            await incidents.tokens.create("ci", "read")
        with pytest.raises(ClientClosed):
            await incidents.tokens.list()
        with pytest.raises(ClientClosed):
            await incidents.tokens.revoke("ci")
        async with incidents:
            await incidents.tokens.list()


async def test_a_store_without_tokens_says_so() -> None:
    """A store of another kind is refused with an error of the tree."""

    class Closed:
        store = object()

        async def write(self, write: Coroutine[Any, Any, Any]) -> Any:
            return await write

    with pytest.raises(StoreError, match="keeps no access tokens"):
        await AccessTokens(Closed()).list()
