"""A reader of server-sent events that follows the rules of a browser's EventSource."""

from __future__ import annotations

import json
import queue
import threading
from typing import TYPE_CHECKING, Any

import httpx2

if TYPE_CHECKING:
    from typing import Self

PATIENCE = 60
"""Seconds to wait for something that has to come."""


class EventSource:
    """Reads a stream in a thread, and reconnects after errors as a browser does.

    A browser reconnects after a broken or a completed stream, and sends the last id. It takes every
    answer but a stream with status 200 as the end.

    Args:
        url: The stream. The server may start later.
        pace: The part of the asked delay to wait before a new connection.

    Attributes:
        connections: How often a stream began.
    """

    def __init__(self, url: str, *, pace: float = 0.05) -> None:
        self.connections = 0
        self._url = url
        self._pace = pace
        self._last_id = ""
        self._retry = 1.0
        self._seen: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; the server has stopped by then, or sends heartbeats often."""
        self._closed.set()
        self._thread.join()

    def next(self) -> tuple[str, Any]:
        """Return the next comment, event, or the status that was the end, with its content."""
        return self._seen.get(timeout=PATIENCE)

    def until(self, kind: str, content: Any = None) -> Any:
        """Return the content of the next item of a kind, or with this content."""
        while True:
            found, has = self.next()
            if found == kind and content in (None, has):
                return has

    def _run(self) -> None:
        with httpx2.Client(timeout=PATIENCE) as client:
            while not self._closed.is_set():
                try:
                    if not self._read(client):
                        return
                except httpx2.TransportError:
                    pass
                self._closed.wait(self._retry * self._pace)

    def _read(self, client: httpx2.Client) -> bool:
        headers = {"Accept": "text/event-stream"}
        if self._last_id:
            headers["Last-Event-ID"] = self._last_id
        with client.stream("GET", self._url, headers=headers) as answer:
            media_type = answer.headers.get("Content-Type", "").partition(";")[0]
            if answer.status_code != 200 or media_type != "text/event-stream":
                self._seen.put(("end", answer.status_code))
                return False
            self.connections += 1
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                if self._closed.is_set():
                    return False
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                else:
                    self._dispatch(fields)
                    fields = {}
        return True

    def _dispatch(self, fields: dict[str, str]) -> None:
        self._last_id = fields.get("id", self._last_id)
        if "retry" in fields:
            self._retry = int(fields["retry"]) / 1000
        if "" in fields:
            self._seen.put(("comment", fields[""]))
        if "data" in fields:
            self._seen.put((fields.get("event", "message"), json.loads(fields["data"])))
