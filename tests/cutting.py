"""A TCP proxy that cuts connections."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class CuttingProxy:
    """Passes connections on, and cuts some of them at random once a request was passed on.

    Half of these are cut at once, before the answer, and half within the answer or after it.

    Args:
        rate: The part of all requests after which it cuts the connection, 0 to 1.
        seed: Makes the cuts the same in each run, as far as the requests are.

    Attributes:
        target: The port of the server; None: there is none at present.
        url: Where it listens.
        cuts: Number of connections that it has cut.
    """

    def __init__(self, rate: float, seed: int = 7) -> None:
        self.target: int | None = None
        self.url = ""
        self.cuts = 0
        self._rate = rate
        self._random = random.Random(seed)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[CuttingProxy]:
        """Listen on a free port inside the block."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            if self.target is None:
                return
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self.target)
            writers.append(to_writer)
            ends = [self._pass_requests(reader, to_writer), self._pass_answers(to_reader, writer)]
            tasks = [asyncio.ensure_future(end) for end in ends]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        except OSError:
            # The server is down: the client sees that its connection ends.
            pass
        finally:
            for each in writers:
                each.transport.abort()

    async def _pass_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while part := await reader.read(65536):
                writer.write(part)
                await writer.drain()
                if self._random.random() < self._rate / 2:
                    self.cuts += 1
                    return

    async def _pass_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while part := await reader.read(65536):
                cut = self._random.random() < self._rate / 2
                writer.write(part[: self._random.randint(0, len(part))] if cut else part)
                await writer.drain()
                if cut:
                    self.cuts += 1
                    return
