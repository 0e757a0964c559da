"""Extend uvicorn's HTTP protocol with limits, joined writes, and hooks for streams.

uvicorn writes the head of an answer and then its body, each with a system call, which takes longer
than all the Python code in between. Here, everything written in one turn of the event loop goes out
at once.

uvicorn limits neither the size of a head, nor the time to receive a request, nor the time to take
an answer. The limits here are those of :mod:`incidentkit.cli.limits`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from functools import lru_cache
from typing import Any, ClassVar, Final, cast
from weakref import WeakKeyDictionary

import httptools
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from incidentkit.cli import limits
from incidentkit.cli.limits import Places
from incidentkit.cli.log import LOG
from incidentkit.http.envelope import NO_SNIFF, NO_STORE, VERSION, Envelope
from incidentkit.http.log import NO_ROUTE, OTHER_METHOD, observe_answer
from incidentkit.http.problems import RETRY_HEADERS, Refusal, problem_response
from incidentkit.http.request_id import NAME, request_id
from incidentkit.http.server_hooks import EXTENSION, ServerHooks
from incidentkit.http.streams import stream_instead
from incidentkit.wire.kinds import Kind

logger = logging.getLogger("incidentkit.http")

PIECE: Final = 8 * 1024
"""Bytes that the parser gets at a time; the limits are checked in between."""

CHECKS: Final = 3
"""Number of checks of a connection in each time limit."""

SOME_ID: Final = "0" * 32
"""Stands for the id of a request in an answer that is made before the request."""

HEALTH: Final = ("/health/live", "/health/ready")
"""The suffixes of the paths that are answered on spare connections, under any prefix."""

STREAM: Final = "/incident/changes"
"""The suffix of the path whose streams are never refused by their status, under any prefix."""

_PLACES: Final[WeakKeyDictionary[ServerState, Places]] = WeakKeyDictionary()
"""The connection limits of each server in this process."""


class JoiningTransport:
    """Joins the writes of one turn of the event loop, and passes everything else on.

    Args:
        transport: The transport of the connection.

    Attributes:
        written: Bytes written so far.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.written = 0
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []
        self._size = 0
        # An attribute, since every answer calls it and __getattr__ is slow.
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write the data in this turn of the event loop, together with the rest of the turn."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)
        self._size += len(data)
        # No more than fits into uvicorn's own buffer, so that it notices a slow reader.
        if self._size > HIGH_WATER_LIMIT:
            self._flush()

    def write_eof(self) -> None:
        """Write the waiting data, and close this direction of the connection."""
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Write the waiting data, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._waiting:
            data = b"".join(self._waiting)
            self._waiting.clear()
            self._size = 0
            # The client may have disconnected since.
            if not self._transport.is_closing():
                self.written += len(data)
                self._transport.write(data)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol on a :class:`JoiningTransport`, with limits and hooks for streams.

    See :mod:`incidentkit.http.server_hooks`. Your own server may use a subclass with other
    limits, for example for large uploads.

    Attributes:
        receive_timeout: Seconds to receive a request, without the time in which the app reads
            nothing of its body.
        send_timeout: Seconds in which a reader must take a part of a waiting answer.
    """

    receive_timeout: ClassVar[float] = limits.RECEIVE_TIMEOUT
    send_timeout: ClassVar[float] = limits.SEND_TIMEOUT

    app: ASGIApp
    cycle: RequestResponseCycle | None  # type: ignore[assignment]
    parser: httptools.HttpRequestParser
    transport: JoiningTransport  # type: ignore[assignment]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._places = _places(self.server_state, self.config.limit_concurrency)
        # uvicorn would count connections that wait, and refuse requests on all of them.
        self.limit_concurrency = None
        self._stopping = asyncio.Event()
        self._hooks: ServerHooks = {"stopping": self._stopping}
        if LOG.used:
            self._hooks["log"] = LOG
        # uvicorn calls the app of the protocol for each request on the connection.
        self.app = _with_hooks(self.app, self._hooks)

        self._unread = b""
        self._refusal: Refusal | None = None
        self._dropped = 0
        # Of the request that is being received:
        self._receiving_since: float | None = None
        self._requests = 0
        self._in_request = False
        self._in_head = False
        self._head = 0
        self._body = 0
        self._framing = 0
        # Of the answer that is being sent:
        self._taken = 0
        self._taken_at: float | None = None
        self._look_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the new connection, or close it if there are too many."""
        joining = JoiningTransport(cast("asyncio.Transport", transport))
        self._hooks["abort"] = joining.abort
        super().connection_made(cast("asyncio.Transport", joining))
        place = self._places.take(self)
        if place is None:
            joining.abort()
            return
        if not place:
            self.app = _only_health(self.app, self.config)
        self._receiving_since = self.loop.time()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        self._leave()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection over to a protocol without these limits."""
        self._leave()
        super().handle_websocket_upgrade()

    def evict(self) -> None:
        """Close the waiting connection to make room for another one."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def shutdown(self) -> None:
        """Begin to stop; uvicorn calls this on each connection when it shuts down."""
        self._stopping.set()
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        """Take data from the connection."""
        if self._refusal is not None:
            self._drop(len(data))
            return
        self._unset_keepalive_if_required()
        if self._receiving_since is None:
            self._receiving_since = self.loop.time()
        self._unread = self._unread + data if self._unread else data
        self._parse()

    # The parser calls these.

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._requests += 1
        self._in_request = self._in_head = True
        self._head = self._body = self._framing = 0
        self._receiving_since = self.loop.time()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the URL."""
        super().on_url(url)
        if len(self.url) > limits.MAX_TARGET:
            raise Refusal(Kind.URI_TOO_LONG, f"The URL must be at most {limits.MAX_TARGET} bytes")

    def on_headers_complete(self) -> None:
        """Begin to answer the request."""
        if (refusal := self._too_large_head()) is not None:
            raise refusal
        if self.parser.should_upgrade():
            self.scope["headers"] = [*self.headers]
        super().on_headers_complete()
        self._in_head = False
        if not self.parser.should_upgrade():
            # uvicorn would add the trailers of a body to the headers that the app has.
            self.headers = []

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request."""
        self._in_request = False
        self._receiving_since = None
        super().on_message_complete()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._places.work(self)

    # The answers call this.

    def on_response_complete(self) -> None:
        """Continue with the next request."""
        super().on_response_complete()
        if self._refusal is not None:
            self.transport.close()
        elif not self.transport.is_closing():
            if not self.pipeline:
                self._places.wait(self)
            if self._unread:
                self._receiving_since = self.loop.time()
                self._parse()

    def _parse(self) -> None:
        """Pass unread data to the parser, unless a whole request is already waiting."""
        unread: bytes | memoryview = self._unread
        if len(unread) > PIECE:
            unread = memoryview(unread)
        at = 0
        while at < len(unread) and not self.pipeline and self._refusal is None:
            piece = unread[at : at + PIECE]
            at += len(piece)
            requests, is_new = self._requests, not self._in_request
            body = 0 if is_new else self._body
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                if self._should_upgrade():
                    self.handle_websocket_upgrade()
                    return
                # The request is answered as if it had not asked for another protocol.
                at += upgrade.args[0] - len(piece)
            except httptools.HttpParserError as error:
                cause = error.__context__
                broken = Refusal(Kind.MALFORMED_REQUEST, "The request is not valid HTTP/1.1")
                self._refuse(cause if isinstance(cause, Refusal) else broken)
                return
            if self._requests == requests + is_new:
                framing = len(piece) - (self._body - body)
                if (refusal := self._too_large(len(piece), framing)) is not None:
                    self._refuse(refusal)
                    return
        self._unread = self._unread[at:]
        if self._unread:
            # The time limit does not apply while the service does not read.
            self._receiving_since = None
            self.flow.pause_reading()

    def _too_large(self, size: int, framing: int) -> Refusal | None:
        """Count a piece that is a part of one request, and return why the request is too large.

        Args:
            size: Bytes of the piece.
            framing: Bytes of the piece that do not belong to the body.
        """
        if self._in_head:
            self._head += size
            return self._too_large_head()
        if self._in_request:
            self._framing += framing
            if self._framing > limits.MAX_HEAD + limits.FRAMING * self._body:
                return Refusal(
                    Kind.HEADERS_TOO_LARGE, "The trailers and the chunk extensions are too large"
                )
            if self.cycle is not None and self.cycle.response_complete:
                self._drop(size)
        return None

    def _too_large_head(self) -> Refusal | None:
        """Return why the request line and the headers that have arrived are too large."""
        if len(self.headers) > limits.MAX_HEADERS:
            return Refusal(
                Kind.HEADERS_TOO_LARGE, f"A request must have at most {limits.MAX_HEADERS} headers"
            )
        size = self._head
        if size + PIECE > limits.MAX_HEAD:
            # The last piece is counted by what the parser has found in it.
            known = sum(len(name) + len(value) + 4 for name, value in self.headers)
            size = max(size, len(self.url) + known)
        if size > limits.MAX_HEAD:
            return Refusal(
                Kind.HEADERS_TOO_LARGE,
                f"The headers must be at most {limits.MAX_HEAD} bytes together",
            )
        return None

    def _refuse(self, refusal: Refusal) -> None:
        """Accept no further request, and answer this one if it is its turn."""
        self._refusal = refusal
        self._unread = b""
        self._receiving_since = None
        cycle = self.cycle
        in_body = self._in_request and not self._in_head
        if self.pipeline or not (cycle is None or in_body or cycle.response_complete):
            # An earlier request is being answered; its answer is the last one.
            self.pipeline.clear()
        elif cycle is not None and in_body and cycle.response_started:
            self.transport.close()
        else:
            if cycle is not None and in_body:
                cycle.disconnected = True
                cycle.message_event.set()
            self._answer(refusal)
            _observe(self.config, refusal)

    def _answer(self, refusal: Refusal) -> None:
        """Send the refusal, and close the connection after the client had time to read it."""
        id_ = request_id({"headers": ()})
        logger.info(
            "Refused with %d: %s", refusal.kind.status, refusal.detail, extra={"request_id": id_}
        )
        headers = b"".join(b"%b: %b\r\n" % header for header in self.server_state.default_headers)
        head, rest = _refusal_answer(refusal.kind, refusal.detail)
        answer = head + headers + rest
        self.transport.write(answer.replace(SOME_ID.encode(), id_.encode()))
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(limits.LINGER_TIMEOUT, self.transport.close)
        else:
            self.transport.close()

    def _drop(self, size: int) -> None:
        """Count bytes that are read after the last answer, and close after too many."""
        self._dropped += size
        if self._dropped > limits.LINGER:
            self.transport.close()

    def _leave(self) -> None:
        self._places.release(self)
        if self._look_timer is not None:
            self._look_timer.cancel()
            self._look_timer = None

    def _look_later(self) -> None:
        delay = min(self.receive_timeout, self.send_timeout) / CHECKS
        if self._receiving_since is not None:
            left = self._receiving_since + self.receive_timeout - self.loop.time()
            delay = min(delay, max(left, 0.0))
        self._look_timer = self.loop.call_later(delay, self._look)

    def _look(self) -> None:
        """Check that the client sends and reads in time; runs several times in each limit."""
        now = self.loop.time()
        since = None if self.transport.is_closing() else self._receiving_since
        if since is not None and self.flow.read_paused:
            # The app does not read.
            self._receiving_since = now
        elif since is not None and now - since >= self.receive_timeout:
            if self._in_request:
                seconds = f"{self.receive_timeout:g}"
                self._refuse(
                    Refusal(
                        Kind.REQUEST_TIMEOUT, f"The request did not arrive within {seconds} seconds"
                    )
                )
            else:
                self._receiving_since = None
                self.transport.close()
        if self._is_taken(now):
            self._look_later()
        else:
            logger.info("Dropped a client that does not read its answer")
            self.transport.abort()

    def _is_taken(self, now: float) -> bool:
        """Return whether the client reads fast enough, or nothing waits to be sent."""
        waiting = self.transport.get_write_buffer_size()
        taken = self.transport.written - waiting
        if not waiting:
            self._taken_at = None
        elif self._taken_at is None or taken - self._taken >= limits.MIN_TAKEN:
            self._taken, self._taken_at = taken, now
        else:
            return now - self._taken_at < self.send_timeout
        return True


@lru_cache
def _refusal_answer(kind: Kind, detail: str) -> tuple[bytes, bytes]:
    """Return the status line of a refusal, and the rest with :data:`SOME_ID` as its request's id.

    Clients that are refused come again and again, so an answer is made only once.
    """
    request = Request({"type": "http", "headers": [(NAME, SOME_ID.encode())]})
    response = problem_response(request, Refusal(kind, detail))
    common = (NAME, SOME_ID.encode()), VERSION, NO_STORE, NO_SNIFF, (b"connection", b"close")
    headers = [*response.raw_headers, *common]
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return STATUS_LINE[kind.status], lines + b"\r\n" + bytes(response.body)


def _places(server: ServerState, limit: int | None) -> Places:
    """Return the connection limits of a server, by its setting or by its open files."""
    places = _PLACES.get(server)
    if places is None:
        limit = limit or limits.connection_limit(limits.max_open_files())
        places = _PLACES[server] = Places(limit)
    return places


def _with_hooks(app: ASGIApp, hooks: ServerHooks) -> ASGIApp:
    # Not a method: the reference cycle would keep the protocol alive after its connection.
    def offer(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        scope.setdefault("extensions", {})[EXTENSION] = hooks
        return app(scope, receive, send)

    return offer


def _observe(config: Config, refusal: Refusal) -> None:
    """Report to the observer a request that the server refused before the app saw it."""
    observe_answer(config.loaded_app, OTHER_METHOD, NO_ROUTE, refusal.kind.status, 0.0)


def _only_health(app: ASGIApp, config: Config) -> ASGIApp:
    """Return the app of a spare connection: it answers health checks, and refuses all else."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        def send_last(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            return send(message)

        if scope["type"] != "http" or scope["path"].endswith(HEALTH):
            await app(scope, receive, send_last)
            return
        detail = "The service has as many connections as it can serve"
        refusal = Refusal(Kind.TOO_MANY_CONNECTIONS, detail, headers=RETRY_HEADERS)
        _observe(config, refusal)
        request = Request(scope)
        stream = stream_instead(request, refusal) if scope["path"].endswith(STREAM) else None
        response = stream or problem_response(request, refusal)
        await response(scope, receive, send_last)

    return Envelope(answer)
