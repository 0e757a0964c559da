"""The service sends an answer in one piece, and loses nothing of it."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from incidentkit.cli.protocol import JoiningTransport


class Wire:
    """A transport that keeps what was done with it."""

    def __init__(self) -> None:
        self.done: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        """Keep the data."""
        self.done.append(data)

    def close(self) -> None:
        """Keep that it was closed."""
        self.done.append("closed")

    def is_closing(self) -> bool:
        """Tell whether it was closed."""
        return "closed" in self.done

    def get_extra_info(self, name: str) -> str:
        """Return what is known of the connection."""
        return f"the {name}"


def joining(wire: Any) -> JoiningTransport:
    """Join what is written to it."""
    return JoiningTransport(wire)


async def test_the_writes_of_one_turn_are_one() -> None:
    """Head and body, written one after the other, are one write; the next turn has its own."""
    wire = Wire()
    transport = joining(wire)
    transport.write(b"head ")
    transport.write(b"body")
    assert wire.done == []
    await asyncio.sleep(0)
    transport.write(b"more")
    await asyncio.sleep(0)
    assert wire.done == [b"head body", b"more"]


async def test_what_was_written_comes_before_the_end() -> None:
    """Closing first writes what waits, and nothing is written twice."""
    wire = Wire()
    transport = joining(wire)
    transport.write(b"all of it")
    transport.close()
    await asyncio.sleep(0)
    assert wire.done == [b"all of it", "closed"]
    assert transport.is_closing()


async def test_nothing_is_written_to_who_has_gone() -> None:
    """What waits when the connection ends is dropped; uvloop raises for a write after that."""
    wire = Wire()
    transport = joining(wire)
    transport.write(b"too late")
    wire.close()
    await asyncio.sleep(0)
    assert wire.done == ["closed"]


async def test_no_more_waits_than_the_buffer_holds() -> None:
    """More than uvicorn lets a slow reader have is written at once, so that uvicorn notices."""
    wire = Wire()
    transport = joining(wire)
    transport.write(bytes(HIGH_WATER_LIMIT))
    assert wire.done == []
    transport.write(b"!")
    assert wire.done == [bytes(HIGH_WATER_LIMIT) + b"!"]


async def test_all_else_is_the_transports_own() -> None:
    """What is known of the connection is asked of the connection."""
    assert joining(Wire()).get_extra_info("peername") == "the peername"
