"""The service sends a response in one write and loses none of it."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from incidentkit.cli.protocol import JoiningTransport


class Wire:
    """A transport that records its calls."""

    def __init__(self) -> None:
        self.done: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        """Record the data."""
        self.done.append(data)

    def close(self) -> None:
        """Record the close."""
        self.done.append("closed")

    def is_closing(self) -> bool:
        """Return whether it was closed."""
        return "closed" in self.done

    def get_extra_info(self, name: str) -> str:
        """Return a fact about the connection."""
        return f"the {name}"


def joining(wire: Any) -> JoiningTransport:
    """Return a joining transport over the wire."""
    return JoiningTransport(wire)


async def test_the_writes_of_one_turn_are_one() -> None:
    """Writes within one turn of the event loop are sent as one."""
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
    """Closing writes the waiting data first, and only once."""
    wire = Wire()
    transport = joining(wire)
    transport.write(b"all of it")
    transport.close()
    await asyncio.sleep(0)
    assert wire.done == [b"all of it", "closed"]
    assert transport.is_closing()


async def test_nothing_is_written_to_a_closed_connection() -> None:
    """Waiting data is dropped when the connection is closed: uvloop would raise."""
    wire = Wire()
    transport = joining(wire)
    transport.write(b"too late")
    wire.close()
    await asyncio.sleep(0)
    assert wire.done == ["closed"]


async def test_no_more_waits_than_the_buffer_holds() -> None:
    """Data above Uvicorn's buffer limit is written at once, so that Uvicorn pauses the app."""
    wire = Wire()
    transport = joining(wire)
    transport.write(bytes(HIGH_WATER_LIMIT))
    assert wire.done == []
    transport.write(b"!")
    assert wire.done == [bytes(HIGH_WATER_LIMIT) + b"!"]


async def test_all_else_is_the_transports_own() -> None:
    """Other attributes come from the wrapped transport."""
    assert joining(Wire()).get_extra_info("peername") == "the peername"
