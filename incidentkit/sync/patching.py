"""Refuse processes whose threads were replaced by gevent or eventlet."""

from __future__ import annotations

import sys
from typing import Any, Final

from incidentkit.domain.errors import WrongEventLoop

REPLACED: Final = (
    "{name} has replaced the threads and sockets of this process, and asyncio cannot run with "
    "them: run the program with real threads, as with gunicorn --worker-class gthread, or "
    "send requests to the REST service, which `incidentkit serve` starts"
)

GEVENT: Final = ("threading", "socket", "select", "queue")
EVENTLET: Final = ("thread", "socket", "select")
"""The modules that asyncio needs unpatched, by the names that each of the two packages uses."""


def check_threads() -> None:
    """Raise unless the threads and sockets of this process are the system's own.

    Raises:
        WrongEventLoop: If gevent or eventlet has replaced them.
    """
    gevent: Any = sys.modules.get("gevent.monkey")
    if gevent is not None and any(map(gevent.is_module_patched, GEVENT)):
        raise WrongEventLoop(REPLACED.format(name="gevent"))
    eventlet: Any = sys.modules.get("eventlet.patcher")
    if eventlet is not None and any(map(eventlet.is_monkey_patched, EVENTLET)):
        raise WrongEventLoop(REPLACED.format(name="eventlet"))
