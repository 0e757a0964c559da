"""Signals that stop the process reach readers first, and then the handlers of the server."""

from __future__ import annotations

import asyncio
import signal
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from incidentkit import IncidentClient
from incidentkit.feed import EMPTY
from incidentkit.http import create_app, lifespan, stop_signals
from incidentkit.http.stop_signals import SIGNALS, on_stop_signal
from tests.http.conftest import MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def handled_by(*handlers: Any) -> Iterator[None]:
    """Install handlers for the signals that stop a process."""
    before = {
        number: signal.signal(number, handler)
        for number, handler in zip(SIGNALS, handlers, strict=False)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Forget the signals of the test."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(stop_signals._Tap, "heard_at", float("-inf"))
        yield


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """The calls that a signal causes; SIGINT and SIGTERM have handlers like a server's."""
    calls: list[str] = []
    with handled_by(
        lambda *_: calls.append("server, SIGINT"), lambda *_: calls.append("server, SIGTERM")
    ):
        yield calls


def says(calls: list[str], name: str) -> Callable[[], object]:
    """Return a listener that records its name."""
    return lambda: calls.append(name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_listeners_and_then_its_handler(
    heard: list[str], number: signal.Signals
) -> None:
    """A signal calls each listener once, and then the server's handler."""
    with on_stop_signal(says(heard, "one")), on_stop_signal(says(heard, "two")):
        signal.raise_signal(number)
    assert sorted(heard[:2]) == ["one", "two"]
    assert heard[2:] == [f"server, {number.name}"]


def test_the_handlers_are_back_alone(heard: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners may leave in any order; the last one leaves the handlers as they were."""
    monkeypatch.setattr(stop_signals, "MEMORY", 0.0)
    before = [signal.getsignal(number) for number in SIGNALS]
    first, second = ExitStack(), ExitStack()
    for _ in range(3):
        first.enter_context(on_stop_signal(says(heard, "first")))
        second.enter_context(on_stop_signal(says(heard, "second")))
        first.close()
        signal.raise_signal(signal.SIGTERM)
        first.enter_context(on_stop_signal(says(heard, "first")))
        second.close()
        first.close()
        assert [signal.getsignal(number) for number in SIGNALS] == before
    assert heard == ["second", "server, SIGTERM"] * 3


def test_a_handler_that_is_installed_meanwhile_stays(heard: list[str]) -> None:
    """A handler that a server installs while a listener is active stays installed."""
    with on_stop_signal(says(heard, "listener")):

        def handler(*_: object) -> None:
            heard.append("later")

        signal.signal(signal.SIGTERM, handler)
    assert signal.getsignal(signal.SIGTERM) is handler
    with on_stop_signal(says(heard, "listener")):
        signal.raise_signal(signal.SIGTERM)
    assert heard == ["listener", "later"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_signal_reaches_a_listener_that_starts_a_little_later(
    heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener that starts right after a signal is called at once; one much later is not."""
    with on_stop_signal(says(heard, "one")):
        signal.raise_signal(signal.SIGTERM)
    with on_stop_signal(says(heard, "two")):
        pass
    monkeypatch.setattr(stop_signals, "MEMORY", 0.0)
    with on_stop_signal(says(heard, "three")):
        pass
    assert heard == ["one", "server, SIGTERM", "two"]


async def test_a_reader_who_comes_right_after_the_signal_does_not_wait(heard: list[str]) -> None:
    """A running app notices a signal even without readers, and the next poll ends at once."""
    app = create_app(IncidentClient.open(MEMORY))
    transport = httpx2.ASGITransport(app)
    async with (
        lifespan(app),
        httpx2.AsyncClient(transport=transport, base_url="http://test") as api,
        asyncio.timeout(20),
    ):
        signal.raise_signal(signal.SIGTERM)
        answer = await api.get("/incident/changes?wait=30")
    assert answer.json() == {"changes": [], "next": EMPTY}
    assert heard == ["server, SIGTERM"]


@pytest.mark.parametrize("default", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_signal_without_a_handler_is_left_alone(default: signal.Handlers) -> None:
    """A signal with the default action, or ignored, gets no handler."""
    with handled_by(default, default), on_stop_signal(list):
        assert [signal.getsignal(number) for number in SIGNALS[:2]] == [default, default]


def test_a_listener_that_fails_does_not_hide_the_signal(heard: list[str]) -> None:
    """The server's handler is called even if a listener raises."""

    def fail() -> None:
        raise ZeroDivisionError

    with on_stop_signal(fail), pytest.raises(ZeroDivisionError):
        signal.raise_signal(signal.SIGTERM)
    assert heard == ["server, SIGTERM"]


async def test_only_the_main_thread_listens(heard: list[str]) -> None:
    """In another thread nothing is installed, and nothing fails."""
    before = [signal.getsignal(number) for number in SIGNALS]

    def listen() -> None:
        with on_stop_signal(says(heard, "thread")):
            assert [signal.getsignal(number) for number in SIGNALS] == before

    await asyncio.to_thread(listen)
    assert heard == []
