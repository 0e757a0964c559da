"""Send requests to a service, and repeat those that failed in transit."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies
from weakref import WeakSet

import httpx2
from attrs import evolve

from incidentkit.affinity import keep, sever
from incidentkit.domain.errors import ClientClosed, InvalidSettings, StoreError, StoreUnavailable
from incidentkit.remote.messages import JSON, Answer, Call
from incidentkit.remote.options import RemoteOptions
from incidentkit.remote.problems import is_passing
from incidentkit.version import __version__

FIRST_PAUSE: Final = 0.1
MAX_PAUSE: Final = 5.0
"""Upper bounds of the random pause in seconds: after the first attempt, doubled by each further
one, and after any."""

MAX_RETRY_AFTER: Final = 30.0
"""Seconds; if a service asks for a longer pause, the call fails at once."""

KEEP_ALIVE: Final = 4.0
"""Seconds for which an unused connection is kept: Uvicorn closes it after five."""

MAX_ANSWER: Final = 64 * 1024 * 1024
"""Maximum bytes of an answer."""

_SSL_FILES: Final = "SSL_CERT_FILE, SSL_CERT_DIR or SSLKEYLOGFILE"
_PROXIES: Final = "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"

_random: Final = random.SystemRandom()


class Connection:
    """Sends requests on connections that it opens and keeps, within the limits of the options.

    A request can be repeated if it only reads or has an idempotency key.

    Args:
        url: The URL of the service, without a slash at its end.
        token: The access token; None: none is sent.
        options: Time limits and number of connections.
    """

    def __init__(self, url: str, token: str | None, options: RemoteOptions) -> None:
        self.url = url
        self._options = options
        self._headers = httpx2.Headers(
            {
                "Accept": JSON,
                # A compressed answer could expand beyond the limit.
                "Accept-Encoding": "identity",
                "User-Agent": f"incidentkit/{__version__}",
            }
        )
        self._headers.update(options.headers)
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._client: httpx2.AsyncClient | None = None
        self._context = options.ssl_context
        self._requests = self._waiting = self._searches = asyncio.Semaphore()
        self._running: set[_Running] = set()
        # The streams of kept connections; a forked process abandons them.
        self._streams: WeakSet[Any] = WeakSet()

    async def open(self) -> None:
        """Get ready to send; the first request opens a connection.

        Raises:
            InvalidSettings: If the environment names certificates or a proxy that cannot be used.
        """
        options = self._options
        encrypted = self.url.startswith("https://") or bool(getproxies())
        if self._context is None and options.transport is None and encrypted:
            # In a thread, since it reads the certificates of all authorities.
            try:
                self._context = await asyncio.to_thread(httpx2.create_ssl_context)
            except OSError as error:
                raise InvalidSettings(
                    _SSL_FILES, f"names a file that cannot be used ({error})"
                ) from error
        self._requests = asyncio.Semaphore(options.max_connections)
        self._waiting = asyncio.Semaphore(options.max_readers)
        self._searches = asyncio.Semaphore(options.max_searches)
        connections = options.max_connections + options.max_readers
        try:
            if options.transport is None:
                _check_ports(getproxies())
            self._client = httpx2.AsyncClient(
                headers=self._headers,
                verify=self._context or False,
                transport=options.transport,
                limits=httpx2.Limits(
                    max_connections=connections,
                    max_keepalive_connections=connections,
                    keepalive_expiry=KEEP_ALIVE,
                ),
                follow_redirects=False,
            )
        except ImportError as error:
            raise InvalidSettings(
                _PROXIES, "names a SOCKS proxy, which needs the package socksio"
            ) from error
        except (httpx2.InvalidURL, ValueError):
            # Its text may show a part of the password.
            raise InvalidSettings(_PROXIES, "is not the URL of a proxy") from None

    async def close(self) -> None:
        """End running requests, and close every connection; once closed, do nothing."""
        client, self._client = self._client, None
        self.interrupt()
        if self._running:
            await asyncio.wait([each.ended for each in self._running])
        if client is not None:
            await client.aclose()

    def interrupt(self, *, waiting: bool = False) -> None:
        """Make running requests raise :class:`~incidentkit.ClientClosed`.

        Args:
            waiting: Whether to interrupt only those that wait for changes.
        """
        for running in self._running:
            if running.call.waits or not waiting:
                running.interrupt()

    def abandon(self) -> None:
        """Release every connection without the event loop, which has ended."""
        for stream in list(self._streams):
            sever(stream)
        self._streams.clear()
        self._running.clear()
        self._client = None

    def sever(self) -> None:
        """Disconnect this forked process from the connections of its parent."""
        keep(self._client)
        self.abandon()

    async def send(self, call: Call) -> Answer:
        """Send a request, and repeat it until its answer is final.

        Raises:
            StoreUnavailable: If there is no answer within the attempts and the deadline.
            StoreError: If the answer cannot be read.
            ClientClosed: If the client is closed, or is being closed.
        """
        seconds = self._options.deadline + call.patience
        failures: list[StoreUnavailable] = []
        running = _Running(call, asyncio.timeout(seconds))
        self._running.add(running)
        try:
            async with running.timer:
                return await self._repeat(call, running.timer, failures)
        except TimeoutError:
            if running.interrupted:
                raise ClientClosed from None
            reason = f"there was no answer within {seconds:g} seconds"
            if failures:
                reason = f"{reason}, after {failures[-1].reason}"
            raise self._unavailable(reason) from (failures[-1] if failures else None)
        finally:
            self._running.discard(running)
            running.ended.set_result(None)

    async def _repeat(
        self, call: Call, timer: asyncio.Timeout, failures: list[StoreUnavailable]
    ) -> Answer:
        attempts = 1 if call.single else self._options.attempts
        number = 0
        while True:
            number += 1
            pause = min(FIRST_PAUSE * 2 ** (number - 1), MAX_PAUSE) * _random.random()
            try:
                answer = await self._attempt(call)
            except httpx2.TransportError as error:
                failure = self._failure(error)
                if number == attempts or not failure.retryable or _too_late(timer, pause):
                    raise failure from error
                failures.append(failure)
            else:
                pause = max(pause, _retry_after(answer))
                final = not is_passing(answer) or number == attempts
                if final or pause > MAX_RETRY_AFTER or _too_late(timer, pause):
                    return evolve(answer, attempts=number)
                failures.append(self._unavailable(f"it answered with status {answer.status}"))
            await asyncio.sleep(pause)

    async def _attempt(self, call: Call) -> Answer:
        """Send a request when it is its turn."""
        if call.waits:
            async with self._waiting:
                return await self._exchange(call)
        async with self._searches if call.slow else nullcontext(), self._requests:
            return await self._exchange(call)

    async def _exchange(self, call: Call) -> Answer:
        options = self._options
        timeout = httpx2.Timeout(
            connect=options.connect_timeout,
            read=options.read_timeout + call.patience,
            write=options.read_timeout,
            # The semaphores guarantee a connection for every request.
            pool=None,
        )
        headers = [(name.encode(), value) for name, value in call.headers.items()]
        if call.body is not None:
            headers.append((b"Content-Type", JSON.encode()))
        client = self._client
        if client is None:
            raise ClientClosed
        request = client.build_request(
            call.method,
            self.url + call.path,
            params=call.query or None,
            headers=headers,
            content=call.body,
            timeout=timeout,
        )
        response = await client.send(request, stream=True)
        try:
            stream = response.extensions.get("network_stream")
            if stream is not None:
                self._streams.add(stream)
            body = await self._read(response)
        finally:
            await response.aclose()
        return Answer(response.status_code, _headers_of(response), body)

    async def _read(self, response: httpx2.Response) -> bytes:
        body = bytearray()
        try:
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MAX_ANSWER:
                    reason = f"its answer has more than {MAX_ANSWER} bytes: ask for fewer incidents"
                    raise StoreError(reason, place=self.url)
        except httpx2.DecodingError as error:
            raise StoreError("its answer cannot be decoded", place=self.url) from error
        return bytes(body)

    def _failure(self, error: httpx2.TransportError) -> StoreUnavailable:
        # That of httpx2 is empty if a server ends the connection before it is encrypted.
        text = ""
        cause: BaseException | None = error
        while cause is not None:
            text = text or str(cause)
            if isinstance(cause, ssl.SSLCertVerificationError):
                reason = f"its certificate is not trusted ({cause.verify_message})"
                return self._unavailable(reason, retryable=False)
            cause = cause.__cause__ or cause.__context__
        match error:
            case httpx2.ConnectTimeout():
                seconds = self._options.connect_timeout
                reason = f"no connection was made within {seconds:g} seconds"
            case httpx2.TimeoutException():
                reason = f"it was silent for {self._options.read_timeout:g} seconds"
            case httpx2.ConnectError():
                reason = f"no connection can be made ({text})"
            case httpx2.ProxyError():
                reason = f"the proxy refuses the connection ({text})"
            case httpx2.RemoteProtocolError() | httpx2.NetworkError():
                reason = "the connection was cut before its answer was complete"
            case _:
                return self._unavailable(f"the request cannot be sent ({text})", retryable=False)
        return self._unavailable(reason)

    def _unavailable(self, reason: str, *, retryable: bool = True) -> StoreUnavailable:
        return StoreUnavailable(reason, place=self.url, retryable=retryable)


class _Running:
    """A request that is being answered.

    Args:
        call: The request.
        timer: Ends it at its deadline.

    Attributes:
        interrupted: Whether it ends because the client is closed.
        ended: Done once the request has ended.
    """

    def __init__(self, call: Call, timer: asyncio.Timeout) -> None:
        self.call = call
        self.timer = timer
        self.interrupted = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def interrupt(self) -> None:
        """End the request now, unless its deadline has just come."""
        if not self.timer.expired():
            self.interrupted = True
            self.timer.reschedule(asyncio.get_running_loop().time())


def _check_ports(proxies: Mapping[str, str]) -> None:
    """Raise ValueError if the port of a proxy is out of range, which httpx2 does not check."""
    for scheme in ("http", "https", "all"):
        url = proxies.get(scheme, "")
        _ = urlsplit(url if "://" in url else f"//{url}").port


def _headers_of(response: httpx2.Response) -> Mapping[str, str]:
    return dict(response.headers)


def _retry_after(answer: Answer) -> float:
    """Return the seconds that a service asks for; a date, which is rare, counts as none."""
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _too_late(timer: asyncio.Timeout, pause: float) -> bool:
    ends_at = timer.when()
    return ends_at is not None and asyncio.get_running_loop().time() + pause >= ends_at
