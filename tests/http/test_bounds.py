"""Limits on what one sender may do at a time."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from click.testing import CliRunner

from incidentkit import IncidentClient, InvalidSettings
from incidentkit.cli import main
from incidentkit.http.authentication import ANONYMOUS
from incidentkit.http.bounds import Bounds
from incidentkit.http.principals import Principal
from incidentkit.settings import Settings
from tests.http.conftest import INCIDENT, MEMORY, service_on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from incidentkit.http.service import Service

ANONYMOUS_NAME = ""


async def by_name(scope: Any) -> Principal:
    """Authenticate a request as the sender that a header names."""
    name = dict(scope["headers"]).get(b"x-name", b"").decode()
    return Principal(name, ANONYMOUS.scopes)


class Api:
    """An app whose reads of incidents can be held up."""

    def __init__(self, app: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        self.app = app
        self.running = 0
        self.go_on = asyncio.Event()
        for verb in ("get", "search"):
            monkeypatch.setattr(app.client, verb, self._held_up(getattr(app.client, verb)))

    def _held_up(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        async def read(*arguments: Any, **options: Any) -> Any:
            self.running += 1
            await self.go_on.wait()
            return await verb(*arguments, **options)

        return read

    async def get(
        self, path: str, name: str = "alice", headers: dict[str, str] | None = None
    ) -> httpx2.Response:
        """Ask for a path under a name."""
        transport = httpx2.ASGITransport(self.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers={"X-Name": name, **(headers or {})})

    async def start(self, path: str, count: int, name: str = "alice") -> list[asyncio.Task[Any]]:
        """Start requests that are held up, and return once all of them run."""
        expected = self.running + count
        tasks = [asyncio.create_task(self.get(path, name)) for _ in range(count)]
        async with asyncio.timeout(30):
            while self.running < expected:  # noqa: ASYNC110
                await asyncio.sleep(0)
        return tasks


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    """An app with the default bounds, and one incident."""
    async with IncidentClient.open(MEMORY) as incidents:
        await incidents.create(INCIDENT["incident_message"], source="monitoring")
        api = Api(service_on(incidents, authenticate=by_name), monkeypatch)
        yield api
        api.go_on.set()


@pytest.mark.parametrize(
    ("path", "count", "what"),
    [
        ("/incident/get/1", 20, "requests"),
        ("/incident/search?text=disk", 2, "searches"),
        ("/incident/search?total=true", 2, "searches"),
    ],
)
async def test_a_sender_has_so_many_at_a_time(api: Api, path: str, count: int, what: str) -> None:
    """One request beyond the limit is refused; other senders are not, and answers free places."""
    running = await api.start(path, count)
    refused = await api.get(path)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert refused.json()["detail"].startswith(
        f"Too many {what} at a time, the maximum is {count}: try again"
    )
    others = [
        *await api.start(path, 1, "bob"),
        *await api.start(path, count + 1, ANONYMOUS_NAME),
    ]
    api.go_on.set()
    answers = [await task for task in (*running, *others)]
    assert {answer.status_code for answer in answers} == {200}
    assert (await api.get(path)).status_code == 200


async def test_a_place_is_free_after_any_end(api: Api) -> None:
    """An error and a cancelled request free their place too."""
    api.go_on.set()
    for _ in range(21):
        assert (await api.get("/incident/get/99")).status_code == 404
    api.go_on.clear()
    for task in await api.start("/incident/get/1", 20):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    api.go_on.set()
    assert (await api.get("/incident/get/1")).status_code == 200


async def test_other_reads_leave_the_searches_alone(api: Api) -> None:
    """A search without text or total takes little time, and counts as a request alone."""
    running = await api.start("/incident/search?status=new", 3)
    searches = await api.start("/incident/search?text=disk", 2)
    assert (await api.get("/incident/search?text=disk")).status_code == 429
    api.go_on.set()
    assert {(await task).status_code for task in (*running, *searches)} == {200}


async def test_a_sender_without_a_place_is_told_to_come_back_to_a_stream(api: Api) -> None:
    """A stream beyond the limit gets 200, since a browser gives up after any other status."""
    running = await api.start("/incident/get/1", 20)
    assert (await api.get("/incident/changes")).status_code == 429
    api.app.readers.count = 100
    stream = await api.get("/incident/changes", headers={"Accept": "text/event-stream"})
    assert stream.status_code == 200
    assert b"every place for a reader is taken" in stream.content
    api.app.readers.count = 0
    api.go_on.set()
    assert {(await task).status_code for task in running} == {200}


async def test_a_body_that_does_not_arrive_takes_a_place(api: Api) -> None:
    """The limit is checked before the body is read."""
    sent: list[Any] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    async def post(receive: Callable[[], Any]) -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/incident/create",
            "query_string": b"",
            "headers": [(b"x-name", b"alice"), (b"content-type", b"application/json")],
        }
        await api.app(scope, receive, keep)

    never = asyncio.Event()
    slow = [asyncio.create_task(post(never.wait)) for _ in range(20)]
    await asyncio.sleep(0)
    assert (await api.get("/incident/get/1")).status_code == 429
    for task in slow:
        task.cancel()
    await asyncio.wait(slow)
    api.go_on.set()
    assert (await api.get("/incident/get/1")).status_code == 200


async def test_an_app_without_authentication_has_no_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mounted app without `authenticate` has no limits per sender."""
    async with IncidentClient.open(MEMORY) as incidents:
        await incidents.create(INCIDENT["incident_message"], source="monitoring")
        api = Api(service_on(incidents, bounds=Bounds(requests=1)), monkeypatch)
        running = await api.start("/incident/get/1", 3)
        api.go_on.set()
        assert {(await task).status_code for task in running} == {200}


@pytest.mark.parametrize("name", ["requests", "readers", "searches"])
@pytest.mark.parametrize("value", [0, 10_001])
def test_a_bound_has_a_range(name: str, value: int) -> None:
    """A limit of zero, which would lock every token out, is refused."""
    with pytest.raises(InvalidSettings, match=rf"bounds.{name} must be from 1 to 10000"):
        Bounds(**{name: value})


def test_the_bounds_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` takes the limits from its options, or else from the environment."""
    command = importlib.import_module("incidentkit.cli.serve")
    given: list[tuple[int, int, int]] = []

    def run_server(settings: Settings, *_: object, **__: object) -> bool:
        per_token = settings.requests_per_token, settings.readers_per_token
        given.append((*per_token, settings.searches_per_token))
        return True

    monkeypatch.setattr(command, "run_server", run_server)
    for name, value in (("REQUESTS", 5), ("READERS", 6), ("SEARCHES", 7)):
        monkeypatch.setenv(f"INCIDENTKIT_{name}_PER_TOKEN", str(value))
    options = ["--requests-per-token", "1", "--readers-per-token", "2", "--searches-per-token", "3"]
    for arguments in ([], options):
        assert CliRunner().invoke(main, ["serve", *arguments]).exit_code == 0
    assert given == [(5, 6, 7), (1, 2, 3)]
