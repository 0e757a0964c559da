"""A client of a service: its settings, its errors, its retries, and its life."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from attrs import evolve, frozen
from starlette.requests import Request

from incidentkit import (
    AccessDenied,
    ClientClosed,
    DuplicateOpenIncident,
    FieldError,
    IdempotencyKeyReused,
    IllegalTransition,
    Incident,
    IncidentClient,
    IncidentConflict,
    IncidentKitError,
    IncidentNotFound,
    IncidentSource,
    IncidentStatus,
    InvalidIncident,
    InvalidSettings,
    NeedsDatabase,
    NewIncident,
    RemoteOptions,
    SchemaOutOfDate,
    Scope,
    StoreError,
    StoreUnavailable,
    UnknownCursor,
    VersionConflict,
    VersionMatch,
    acting_as,
)
from incidentkit.http import create_app
from incidentkit.http.authentication import TokenAuth
from incidentkit.http.problems import problem_response
from incidentkit.remote import RemoteStore, connection
from incidentkit.remote.messages import Answer, Call
from incidentkit.remote.problems import ERRORS, error_for
from incidentkit.settings import Settings
from incidentkit.store import store_from_url
from incidentkit.store.options import StoreOptions
from incidentkit.version import API_VERSION
from incidentkit.wire import encode_incident
from incidentkit.wire.kinds import Kind
from tests.hosts import run_sql
from tests.programs import outcome, start
from tests.remotes import Host, over_asgi
from tests.test_public_api import run_python

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

SERVICE = "https://incidents.example.com/prefix"
TOKEN = "ik_the-secret-of-the-token"

DISK = Incident(
    7,
    "Disk is full",
    IncidentStatus.COMPLETED,
    IncidentSource.MONITORING,
    datetime(2026, 3, 1, 9, 30, tzinfo=UTC),
)


@frozen
class Reply:
    """A scripted answer."""

    status: int
    body: bytes
    headers: dict[str, str]

    def response(self) -> httpx2.Response:
        """Return it as a new response, since one can be read only once."""
        stream = httpx2.ByteStream(self.body)
        return httpx2.Response(self.status, headers=self.headers, stream=stream)


class Script(httpx2.AsyncBaseTransport):
    """Answers requests by a script, and then with an incident or a list, as requested.

    Args:
        *steps: What each request in turn meets: an error, or an answer.

    Attributes:
        requests: The requests.
    """

    def __init__(self, *steps: httpx2.TransportError | Reply) -> None:
        self._steps = list(steps)
        self.requests: list[httpx2.Request] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Record a request, and answer it."""
        self.requests.append(request)
        step = self._steps.pop(0) if self._steps else None
        if isinstance(step, Exception):
            raise step
        if step is None and request.method == "GET":
            step = answer(200, b"[]")
        return (step or answer(201, encode_incident(DISK))).response()


def answer(status: int, body: bytes, media_type: str = "application/json", **headers: str) -> Reply:
    """Return an answer."""
    return Reply(status, body, {"Content-Type": media_type, **headers})


def problem(kind: Kind, **members: Any) -> bytes:
    """Return the body of a problem."""
    problem = {"code": kind.code, "detail": "It is so", "request_id": "r1", "errors": []}
    return json.dumps({**problem, **members}).encode()


def refusal(kind: Kind, **headers: str) -> Reply:
    """Return an answer that reports a problem."""
    return answer(kind.status, problem(kind), "application/problem+json", **headers)


def opened(transport: httpx2.AsyncBaseTransport, **options: Any) -> IncidentClient:
    """Return a client that sends its requests with a transport."""
    remote = RemoteOptions(transport=transport, **options)
    return IncidentClient.open(SERVICE, token=TOKEN, remote=remote)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat requests without a pause, unless a service asks for one."""
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.0)


# Opening


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"redis_url": "redis://localhost"}, "redis_url belongs to the service"),
        ({"redis_required": True}, "redis_required belongs to the service"),
        ({"max_staleness": 1.0}, "max_staleness belongs to the service"),
        ({"transitions": {"new": ["failed"]}}, "transitions belongs to the service"),
        ({"options": StoreOptions()}, "options belongs to the service"),
        ({"schema": "tenant"}, "schema belongs to the service"),
        ({"token": ""}, "token must have 1 to 4096 visible ASCII characters"),
        ({"token": "a\nb"}, "token must have 1 to 4096 visible ASCII characters"),
        ({"token": "é"}, "token must have 1 to 4096 visible ASCII characters"),
        ({"database": "https://u:p@host"}, "database must not have a user or a password"),
        ({"database": "https://host/?a=b"}, "database must not have a query or a fragment"),
        ({"database": "https://host/#a"}, "database must not have a query or a fragment"),
        ({"database": "https://"}, "database must be the URL of a service"),
        ({"database": "https://host:0"}, "database must be the URL of a service"),
        ({"database": "https://host:99999"}, "database must be the URL of a service"),
        ({"database": "https://[::1"}, "database must be the URL of a service"),
        ({"database": "https://a host"}, "database must be the URL of a service"),
        ({"database": "http://host", "token": TOKEN}, "token would be sent unencrypted"),
        ({"database": "sqlite://", "token": TOKEN}, "token is for the URL of a service"),
        ({"database": "sqlite://", "remote": RemoteOptions()}, "remote is for the URL of a serv"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], reason: str) -> None:
    """The error names the argument and its rule, and never shows a value."""
    with pytest.raises(InvalidSettings, match=reason) as caught:
        IncidentClient.open(**{"database": SERVICE, **arguments})
    assert TOKEN not in str(caught.value)
    assert "u:p" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000/",
        "http://incidents.localhost",
        "http://127.0.0.1",
        "http://[::1]:8000/prefix/",
        "HTTPS://incidents.example.com:8443",
    ],
)
def test_a_token_is_sent_encrypted_or_within_the_machine(url: str) -> None:
    """A token may be sent without TLS to a loopback host, or with an option to any host."""
    assert isinstance(IncidentClient.open(url, token=TOKEN).store, RemoteStore)
    trusted = RemoteOptions(plain_http=True)
    IncidentClient.open("http://incidents.internal", token=TOKEN, remote=trusted)


@pytest.mark.parametrize("url", ["https://incidents.example.com", "HTTP://localhost"])
def test_the_environment_names_a_database(url: str) -> None:
    """Where a database is needed, the URL of a service is refused with a remedy."""
    with pytest.raises(InvalidSettings, match=r"^INCIDENTKIT_DATABASE_URL is that of a service: "):
        Settings.from_mapping({"INCIDENTKIT_DATABASE_URL": url})
    with pytest.raises(InvalidSettings, match=r"^database_url is that of a service: pass it to"):
        store_from_url(url)


NUMBERS = ("attempts", "max_connections", "max_readers", "max_searches")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, value) for name in ("deadline", "connect_timeout", "read_timeout") for value in
          (0, -1, 3601, float("nan"), float("inf"), True, "5", None)),
        *((name, value) for name in NUMBERS for value in (0, -1, 10_001, 1.0, True, None)),
        ("ssl_context", True),
        ("plain_http", 1),
        ("headers", {"X": "a\nb"}),
        ("headers", ["X"]),
        ("transport", "https"),
    ],
)  # fmt: skip
def test_faulty_options_are_refused_by_name(name: str, wrong: Any) -> None:
    """The error names the option and its rule."""
    with pytest.raises(InvalidSettings, match=rf"^remote\.{name} must be "):
        RemoteOptions(**{name: wrong})


def test_secrets_are_in_no_repr() -> None:
    """Neither the token nor the headers of the options are shown."""
    remote = RemoteOptions(headers={"X-Proxy-Secret": "hush"})
    client = IncidentClient.open(SERVICE, token=TOKEN, remote=remote)
    shown = repr((remote, client, client.store, vars(client.store)))
    assert "hush" not in shown
    assert TOKEN not in shown


def test_a_missing_package_is_named() -> None:
    """Without httpx2, only the client of a service fails, and the error says what to install."""
    code = (
        "from incidentkit import IncidentClient, MissingDependency, RemoteOptions\n"
        "RemoteOptions()\n"
        "IncidentClient.open('sqlite+aiosqlite:///:memory:')\n"
        "try:\n    IncidentClient.open('https://host')\n"
        "except MissingDependency as error:\n    print(error)"
    )
    said = run_python(code, without=("httpx2", "httpcore2"))
    assert said == "httpx2 is not installed: pip install 'incidentkit[remote]'\n"


async def test_connecting_makes_one_request() -> None:
    """The one request has the token and keeps the prefix of the URL."""
    script = Script()
    async with opened(script, headers={"X-Proxy": "a"}):
        (request,) = script.requests
    assert str(request.url) == f"{SERVICE}/incident/get?limit=1"
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert request.headers["x-proxy"] == "a"


HTML = answer(200, b"<html>Welcome</html>", "text/html")


@pytest.mark.parametrize(
    ("found", "error", "said"),
    [
        (HTML, StoreError, "its answer is not from incidentkit: check the URL"),
        (answer(404, b"?", "text/html"), StoreError, r"does not answer here \(status 404\): check"),
        (refusal(Kind.UNKNOWN_PATH), StoreError, r"It is so \(request r1\)"),
        (answer(401, b"", "text/html"), AccessDenied, "something other than incidentkit answered"),
        (refusal(Kind.UNAUTHENTICATED), AccessDenied, r"denies access: It is so \(request r1\)"),
        (answer(502, b"", "text/html"), StoreUnavailable, "other than incidentkit answered with"),
        (answer(500, b"x", "application/problem+json"), StoreError, "answered with status 500"),
        (answer(200, b"{}"), StoreError, "its answer is not from incidentkit"),
        (answer(200, b"[{}]"), StoreError, "its answer is not from incidentkit"),
        (answer(200, b"[" * 100_000), StoreError, "its answer is not from incidentkit"),
        (
            answer(308, b"", location="https://user:hush@new.example.com:444/login?token=hush"),
            StoreError,
            "it redirects to https://new.example.com:444: use that URL",
        ),
        (answer(302, b"", location="/login"), StoreError, "it redirects to another path"),
        (
            answer(200, b"[]", **{"Incidentkit-Version": "2.0"}),
            StoreError,
            f"its API has version 2.0, but this incidentkit needs version {API_VERSION}",
        ),
    ],
)
async def test_connecting_shows_a_wrong_url_token_or_version(
    found: Reply, error: type[StoreError], said: str
) -> None:
    """The error names the URL and the cause, and the client is not open."""
    client = opened(Script(found), attempts=1)
    with pytest.raises(error, match=said) as caught:
        await client.connect()
    assert type(caught.value) is error
    assert caught.value.place == SERVICE
    assert f"The service {SERVICE}" in str(caught.value)
    assert "hush" not in str(caught.value)
    assert not client.connected


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SSL_CERT_FILE", "/no/such/file", "DIR or SSLKEYLOGFILE names a file that cannot be used"),
        ("ALL_PROXY", "foo://u:hush@proxy", "^HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is not the URL"),
        ("ALL_PROXY", "http://u:hush#@proxy", "^HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is not the"),
        ("ALL_PROXY", "http://u:hush@proxy:70000", "^HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is not"),
        ("HTTPS_PROXY", "u:hush@proxy:70000", "^HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is not the"),
        ("ALL_PROXY", "socks5://u:hush@proxy", "a SOCKS proxy, which needs the package socksio"),
    ],
)
async def test_what_the_environment_names_wrongly_is_a_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    """The error names the variables and never a password, and the client is not open."""
    monkeypatch.setenv(name, value)
    client = IncidentClient.open(SERVICE, token=TOKEN)
    with pytest.raises(InvalidSettings, match=said) as caught:
        await client.connect()
    assert "hush" not in "".join(traceback.format_exception(caught.value))
    assert not client.connected


@pytest.mark.parametrize("version", ["1.0", "1.99", None])
async def test_versions_that_fit_connect(version: str | None) -> None:
    """A service with the same major version, or with no version, is accepted."""
    headers = {} if version is None else {"Incidentkit-Version": version}
    async with opened(Script(answer(200, b"[]", **headers))) as incidents:
        assert incidents.connected


@pytest.fixture
async def service(migrated_sqlite_url: str) -> AsyncIterator[IncidentClient]:
    """The client of a service that requires tokens."""
    async with IncidentClient.open(migrated_sqlite_url) as client:
        yield client


def to(service: IncidentClient, token: str | None, **options: Any) -> IncidentClient:
    """Return a client of the service."""
    app = create_app(service, authenticate=TokenAuth(service))
    remote = RemoteOptions(transport=httpx2.ASGITransport(app), **options)
    return IncidentClient.open("https://service", token=token, remote=remote)


async def test_a_token_allows_what_its_scopes_say(service: IncidentClient) -> None:
    """A wrong token is refused at once; a token that lacks a scope, when the scope is needed."""
    report = (await service.tokens.create("ci", "report")).secret
    write = (await service.tokens.create("ops", ["write", "read", "act-as"])).secret
    for token in (None, TOKEN, report[:-1] + "#"):
        with pytest.raises(AccessDenied, match="needs a valid access token"):
            await to(service, token).connect()
    async with to(service, report) as incidents:
        with acting_as("alice"), pytest.raises(AccessDenied, match="scope act-as"):
            await incidents.create("Disk is full", source="monitoring")
        await incidents.create("Disk is full", source="monitoring")
        with pytest.raises(AccessDenied, match="needs a token with the scope read"):
            await incidents.get(1)
    async with to(service, write) as incidents:
        with acting_as("zoë"):
            await incidents.note(1, "It is db-1")
        assert [event.actor for event in await incidents.history(1)] == ["ci", "ops/zoë"]
        await incidents.check()
        with pytest.raises(AccessDenied, match="scope admin"):
            await incidents.purge(datetime.now(UTC))


async def test_check_shows_an_unready_service(
    service: IncidentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outdated schema is reported with its revisions, and a lost database as unavailable."""
    token = (await service.tokens.create("ops", "read")).secret
    async with to(service, token, attempts=1) as incidents:

        async def fail() -> None:
            raise error

        monkeypatch.setattr(service.store, "check", fail)
        error: Exception = SchemaOutOfDate("a1", "b2")
        with pytest.raises(SchemaOutOfDate, match=r"revision a1; .* needs revision b2") as caught:
            await incidents.check()
        assert (caught.value.current, caught.value.expected) == ("a1", "b2")
        error = StoreUnavailable("it is away")
        with pytest.raises(StoreUnavailable, match="The service is not ready"):
            await incidents.check()


# Errors


CALL = Call("POST", "/", incident_id=7, to_status=IncidentStatus.NEW, idempotency_key="k")


@pytest.mark.parametrize(
    "error",
    [
        InvalidIncident([FieldError("note", "is wrong"), FieldError("status", "is wrong")]),
        IdempotencyKeyReused("k"),
        IncidentNotFound(7),
        IncidentConflict(DISK),
        VersionConflict(DISK),
        IllegalTransition(DISK, IncidentStatus.NEW),
        DuplicateOpenIncident(DISK),
        UnknownCursor(),
        SchemaOutOfDate("a1", "b2"),
        StoreUnavailable("it is away"),
        StoreError("it refuses"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_service_is_that_of_its_client(error: IncidentKitError) -> None:
    """The error has the same class and the same public attributes as on the database."""
    response = problem_response(Request({"type": "http", "headers": []}), error)
    found = error_for(
        Answer(response.status_code, dict(response.headers), bytes(response.body)), SERVICE, CALL
    )
    assert type(found) is type(error)
    if not isinstance(error, StoreError):
        assert (found.args, str(found)) == (error.args, str(error))
    elif isinstance(found, StoreError):
        assert (found.place, found.retryable) == (SERVICE, error.retryable)


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_of_problem_is_an_error(kind: Kind) -> None:
    """A problem that no verb raises on a database is a StoreError or one of its subclasses."""
    members = {"incident": json.loads(encode_incident(DISK))}
    body = problem(kind, **members, errors=[{"field": "a", "reason": "b"}])
    found = error_for(
        Answer(kind.status, {"content-type": "application/problem+json"}, body), SERVICE, CALL
    )
    if kind.error in ERRORS:
        expected = kind.error
    elif kind.status in (401, 403):
        expected = AccessDenied
    else:
        expected = StoreUnavailable if kind.status in (429, 503) else StoreError
    assert type(found) is expected


def test_each_error_that_a_verb_raises_has_a_kind() -> None:
    """Every error in the client's table is one that a service can answer with."""
    assert {kind.error for kind in Kind} >= ERRORS.keys()


def test_a_problem_of_a_newer_service_is_known_by_its_status() -> None:
    """An unknown code, or an unknown member, still raises the error of the status."""
    for status, expected in ((403, AccessDenied), (503, StoreUnavailable), (418, StoreError)):
        body = json.dumps({"code": "new", "detail": "It is new", "request_id": "r", "more": 1})
        media_type = {"content-type": "application/problem+json"}
        found = error_for(Answer(status, media_type, body.encode()), SERVICE, CALL)
        assert type(found) is expected
        assert "It is new (request r)" in str(found)


async def test_fields_of_a_newer_service_are_ignored_and_missing_ones_have_defaults() -> None:
    """An older service may lack a field, and a newer one may have more."""
    body = json.loads(encode_incident(DISK))
    del body["ended_at"], body["occurrences"]
    async with opened(Script(answer(200, b"[]"))) as incidents:
        script = Script(answer(200, json.dumps({**body, "color": "red"}).encode()))
        incidents.store._connection._client._transport = script  # type: ignore[attr-defined]
        assert await incidents.get(7) == DISK


@pytest.mark.parametrize(
    "body", [b"null", b"1", b'"purged"', b"[]", b"{}", b"<html>", b"[" * 10**5]
)
async def test_any_other_answer_is_an_error_of_the_store(body: bytes) -> None:
    """Every verb reports a JSON answer that does not come from incidentkit."""
    ended_before = datetime(2026, 1, 1, tzinfo=UTC)
    async with opened(Script(answer(200, b"[]"))) as incidents:
        script = Script(*[answer(200, body)] * 3)
        incidents.store._connection._client._transport = script  # type: ignore[attr-defined]
        for call in (
            incidents.get(7),
            incidents.purgeable(ended_before),
            incidents.purge(ended_before),
        ):
            with pytest.raises(StoreError, match="its answer is not from incidentkit"):
                await call


async def test_what_needs_a_database_says_so(service: IncidentClient) -> None:
    """The error names the verb."""
    token = (await service.tokens.create("ops", list(Scope))).secret
    connection: Any = object()
    async with to(service, token) as incidents:
        with pytest.raises(NeedsDatabase, match="no operation for join: open a client on the data"):
            incidents.join(connection)
        with pytest.raises(NeedsDatabase, match="no operation for tokens"):
            await incidents.tokens.list()
        with pytest.raises(NeedsDatabase, match="no operation for feed_blocker"):
            await incidents.feed_blocker()


async def test_too_many_incidents_are_refused_before_they_are_sent() -> None:
    """The error names the limit; with a batch, each one is a request."""
    script = Script()
    async with opened(script) as incidents:
        for new, said in (
            ([NewIncident("Disk is full", "monitoring")] * 1001, "at most 1000 in one request"),
            ([NewIncident("\U0001f525" * 1000, "monitoring")] * 600, "at most 2097152 bytes"),
        ):
            with pytest.raises(InvalidIncident, match=f"incidents must be {said}.*: pass fewer"):
                await incidents.create_many(new)
        with pytest.raises(InvalidIncident, match="dedup_keys must be at most 1000 in one requ"):
            await incidents.resolve_many(["disk"] * 1001)
        assert len(script.requests) == 1


async def test_ended_incidents_may_be_none() -> None:
    """No open incident is an answer without content, or null in place of an incident."""
    both = b"[null,%b]" % encode_incident(DISK)
    script = Script(answer(200, b"[]"), answer(204, b""), answer(200, both))
    async with opened(script) as incidents:
        assert await incidents.resolve("disk", note="It is over") is None
        assert await incidents.resolve_many(["disk", "line"], status="failed") == [None, DISK]
        assert await incidents.resolve("disk") == DISK
    assert [json.loads(request.content) for request in script.requests[1:3]] == [
        {"dedup_key": "disk", "status": "completed", "note": "It is over"},
        {"dedup_keys": ["disk", "line"], "status": "failed", "note": None},
    ]


@pytest.mark.parametrize("text", [" a", "a ", "a\tb\n", "a\x7f"])
async def test_texts_that_no_header_can_carry_are_refused(text: str) -> None:
    """Texts that a header would change or cannot carry are refused."""
    script = Script()
    async with opened(script) as incidents:
        with pytest.raises(InvalidIncident, match=r"^idempotency_key must not begin or"):
            await incidents.create("Disk is full", source="partner", idempotency_key=text)
        with acting_as(text), pytest.raises(InvalidIncident, match=r"^actor must not begin"):
            await incidents.create("Disk is full", source="partner")
        assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("expected", "headers"),
    [
        (None, (None, None)),
        (3, ('"3"', None)),
        ("3-5f1c9a0e77d2", ('"3-5f1c9a0e77d2"', None)),
        (VersionMatch((1, 2), (3,)), ('"1", "2"', '"3"')),
        (VersionMatch(()), ('"-"', None)),
        (VersionMatch(None, ("3-5f1c9a0e77d2",)), (None, '"3-5f1c9a0e77d2"')),
    ],
)
async def test_expected_versions_are_preconditions(expected: Any, headers: Any) -> None:
    """Expected versions are sent as entity tags."""
    script = Script()
    async with opened(script) as incidents:
        await incidents.update_status(7, "completed", expected_version=expected)
    sent = script.requests[-1].headers
    assert (sent.get("if-match"), sent.get("if-none-match")) == headers


# Retries


PASSING = [
    httpx2.ConnectError("refused"),
    httpx2.ConnectTimeout("slow"),
    httpx2.ReadError("reset"),
    httpx2.WriteError("reset"),
    httpx2.ReadTimeout("silent"),
    httpx2.RemoteProtocolError("closed"),
    answer(502, b"", "text/html"),
    answer(504, b"", "text/html"),
    refusal(Kind.STORE_UNAVAILABLE),
    refusal(Kind.TOO_MANY_REQUESTS, **{"Retry-After": "0"}),
]


@pytest.mark.parametrize("failure", PASSING, ids=lambda each: str(each)[:25])
async def test_passing_failures_are_repeated_with_the_same_key(failure: Any) -> None:
    """The third attempt succeeds, and each write has one idempotency key for all attempts."""
    script = Script(answer(200, b"[]"), failure, failure)
    async with opened(script) as incidents:
        assert await incidents.create("Disk is full", source="monitoring") == DISK
        await incidents.create("Disk is full", source="monitoring", idempotency_key="mine")
    keys = [request.headers.get("idempotency-key") for request in script.requests[1:]]
    assert keys[:3] == [keys[0]] * 3
    assert keys[0] is not None
    assert keys[3] == "mine"


@pytest.mark.parametrize("failure", PASSING, ids=lambda each: str(each)[:25])
async def test_after_the_last_attempt_the_service_is_unavailable(failure: Any) -> None:
    """The error names the service, and a retry may succeed later."""
    script = Script(answer(200, b"[]"), *[failure] * 5)
    async with opened(script) as incidents:
        with pytest.raises(StoreUnavailable, match=f"^The service {SERVICE} is unav") as caught:
            await incidents.create("Disk is full", source="monitoring")
        assert caught.value.retryable
        assert len(script.requests) == 4


@pytest.mark.parametrize(
    "final",
    [
        refusal(Kind.SCHEMA_OUT_OF_DATE),
        refusal(Kind.STORE_ERROR),
        refusal(Kind.INVALID_INCIDENT),
        refusal(Kind.UNAUTHENTICATED),
        refusal(Kind.INCIDENT_NOT_FOUND),
        answer(503, b"", **{"Retry-After": "31"}),
        answer(503, b"", **{"Retry-After": "20"}),
        answer(503, b"", **{"Retry-After": "9" * 400}),
        answer(307, b"", location="https://other"),
    ],
    ids=str,
)
async def test_other_answers_are_not_repeated(final: Reply) -> None:
    """A refusal is final, and so is a `Retry-After` beyond the deadline."""
    script = Script(answer(200, b"[]"), final)
    async with opened(script) as incidents:
        with pytest.raises(IncidentKitError):
            await incidents.note(7, "It is db-1")
        assert len(script.requests) == 2


async def test_the_pause_that_a_service_asks_for_is_made() -> None:
    """`Retry-After` is honored within the deadline."""
    loop = asyncio.get_running_loop()
    script = Script(answer(200, b"[]"), refusal(Kind.TOO_MANY_REQUESTS, **{"Retry-After": "1"}))
    async with opened(script) as incidents:
        started = loop.time()
        assert await incidents.list() == []
        assert loop.time() - started >= 1


class Silent(httpx2.AsyncBaseTransport):
    """Answers the first request, and no other one."""

    def __init__(self) -> None:
        self.asked = asyncio.Semaphore(0)
        self._first = True

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer, or never."""
        if self._first:
            self._first = False
            return await Script().handle_async_request(request)
        self.asked.release()
        await asyncio.Event().wait()
        raise AssertionError


async def test_the_deadline_covers_the_wait_for_a_connection() -> None:
    """A call without an answer, and a call that waits for its turn, both end at their deadline."""
    async with opened(Silent(), max_connections=1) as incidents:
        store: Any = incidents.store
        store._connection._options = evolve(store._connection._options, deadline=0.05)
        calls = [incidents.get(1), incidents.create("Disk is full", source="monitoring")]
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, StoreUnavailable)
            assert str(error) == (
                f"The service {SERVICE} is unavailable: there was no answer within 0.05 seconds"
            )


async def test_an_untrusted_certificate_is_not_tried_again() -> None:
    """Someone has to act first, and the error says what is wrong."""
    cause = ssl_error()
    failure = httpx2.ConnectError("failed")
    failure.__cause__ = cause
    script = Script(failure)
    with pytest.raises(StoreUnavailable, match="its certificate is not trusted") as caught:
        await opened(script).connect()
    assert not caught.value.retryable
    assert len(script.requests) == 1


async def test_a_connection_that_ends_before_it_is_encrypted_has_a_reason() -> None:
    """The error says what happened, also where that of httpx2 has no text."""

    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with await asyncio.start_server(end, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        remote = RemoteOptions(attempts=1)
        client = IncidentClient.open(f"https://127.0.0.1:{port}", token=TOKEN, remote=remote)
        with pytest.raises(StoreUnavailable, match=r"no connection can be made \(.+\)"):
            await client.connect()


def ssl_error() -> Exception:
    """Return the error of a certificate that is not trusted."""
    import ssl

    error = ssl.SSLCertVerificationError("certificate verify failed")
    error.verify_message = "self-signed certificate"
    return error


async def test_an_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless answer raises an error before it fills the memory."""
    monkeypatch.setattr(connection, "MAX_ANSWER", 10)
    async with opened(Script(answer(200, b"[]"), answer(200, b" " * 11))) as incidents:
        with pytest.raises(StoreError, match="its answer has more than 10 bytes"):
            await incidents.list()


# Life


async def test_closing_ends_waiting_and_running_reads() -> None:
    """Running calls raise ClientClosed, and the client can be opened again."""
    transport = Silent()
    client = opened(transport, deadline=60)
    await client.connect()
    calls: list[Callable[[], Any]] = [
        lambda: client.read_changes(wait=30),
        lambda: client.get(1),
        lambda: anext(aiter(client.changes())),
    ]
    running = [asyncio.ensure_future(call()) for call in calls]
    for _ in running:
        await transport.asked.acquire()
    await client.close()
    for error in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(error, ClientClosed)
    with pytest.raises(ClientClosed):
        await client.get(1)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # what the ended event loop left open
def test_it_opens_again_once_its_event_loop_has_ended(migrated_sqlite_url: str, host: Host) -> None:
    """After an `asyncio.run` that did not close it, a client can be opened and closed again."""

    async def use() -> None:
        await client.connect()
        await client.create("Disk is full", source="monitoring")

    async def finish() -> None:
        async with client:
            assert len(await client.list()) == 2

    with host.serving(migrated_sqlite_url) as url:
        client = IncidentClient.open(url)
        for _ in range(2):
            asyncio.run(use())
        asyncio.run(client.close())
        asyncio.run(finish())
    gc.collect()


FORKING = """
import asyncio, os, sys
from incidentkit import IncidentClient, WrongEventLoop

client = IncidentClient.open(sys.argv[1])


async def report():
    await client.create("Disk is full", source="monitoring")


async def connect_and_report():
    async with client:
        await report()


async def refused():
    try:
        await report()
    except WrongEventLoop as error:
        print(error, flush=True)


with asyncio.Runner() as runner:
    runner.run(client.connect())
    runner.run(report())
    child = os.fork()
    if not child:
        asyncio.run(refused())
        asyncio.run(connect_and_report())
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # On the kept connection, which the child has not touched.
    runner.run(report())
    runner.run(client.close())
sys.exit(code)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_opens_connections_of_its_own(
    migrated_sqlite_url: str, host: Host
) -> None:
    """The child's error says to connect again, and the parent keeps using its connections."""
    with host.serving(migrated_sqlite_url) as url:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        program = ("-W", "error", "-c", FORKING)
        code, said, errors = outcome(start(url, program=program, env=environment))
        assert (code, errors) == (0, "")
        assert "connect it after the fork" in said
    assert len(asyncio.run(run_sql(migrated_sqlite_url, 'SELECT 1 FROM "Incident"'))) == 3


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A server of services."""
    with Host() as host:
        yield host


async def test_nothing_is_logged_that_is_secret(
    service: IncidentClient, caplog: pytest.LogCaptureFixture
) -> None:
    """No log, at any level, contains the token."""
    caplog.set_level(logging.DEBUG)
    token = (await service.tokens.create("ops", "read")).secret
    async with to(service, token) as incidents:
        await incidents.list()
    with pytest.raises(AccessDenied) as caught:
        await to(service, token[:-1] + "#").connect()
    assert token[3:40] not in caplog.text
    assert token[3:40] not in str(caught.value)


async def test_one_client_is_within_the_bounds_of_one_token(service: IncidentClient) -> None:
    """The service never refuses calls of one client for their number."""
    token = (await service.tokens.create("ops", ["read", "write"])).secret
    async with to(service, token, attempts=1) as incidents:
        following = [asyncio.ensure_future(incidents.read_changes(wait=30)) for _ in range(30)]
        calls = (incidents.create(f"Disk {n} is full", source="monitoring") for n in range(40))
        created = await asyncio.gather(*calls)
        await asyncio.gather(*(incidents.search(text="disk", total=True) for _ in range(20)))
        pages = await asyncio.gather(*following)
    assert len({one.incident_id for one in created}) == 40
    assert all(page.changes for page in pages)


async def test_a_list_is_one_request(migrated_sqlite_url: str) -> None:
    """The client caches no pages, so each list is as fresh as the service's."""
    async with over_asgi(migrated_sqlite_url) as incidents:
        await incidents.create("Disk is full", source="monitoring")
        script = Script()
        incidents.store._connection._client._transport = script  # type: ignore[attr-defined]
        for _ in range(2):
            assert await incidents.list() == []
        assert len(script.requests) == 2
