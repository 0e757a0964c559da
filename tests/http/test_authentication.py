"""Authentication with access tokens, and what answers reveal without one."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from openapi_spec_validator import validate as validate_document

from incidentkit import IncidentClient, Scope, StoreError, StoreUnavailable
from incidentkit.http import authentication
from incidentkit.http.authentication import ANONYMOUS, TokenAuth
from incidentkit.http.browsers import LOOPBACK, BrowserGuard
from incidentkit.http.metrics import METRICS
from incidentkit.http.principals import Principal
from incidentkit.http.routes import ADMINISTRATION, DOCS, OPERATIONS
from incidentkit.observers.prometheus import PrometheusObserver
from incidentkit.store.sql.naming import text
from tests.http.conftest import INCIDENT, Records, service_on, validate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from incidentkit.http.operation import Operation

ALL = tuple(Scope)
EVERY_OPERATION = (*OPERATIONS, *ADMINISTRATION, *DOCS, *METRICS)
REPORTED = {"incident_message": "Disk is full on db-1", "source": "partner", "dedup_key": "disk"}


class Service:
    """A service with tokens, that is called without a network."""

    def __init__(self, incidents: IncidentClient, auth: Any, **options: Any) -> None:
        self.incidents = incidents
        self.auth = auth
        self.app = service_on(incidents, authenticate=auth, **options)

    async def token(self, name: str = "ci", *scopes: Scope | str, **options: Any) -> str:
        """Create a token, by default with every scope, and return its secret."""
        created = await self.incidents.tokens.create(name, scopes or ALL, **options)
        return created.secret

    async def send(
        self,
        method: str,
        path: str,
        token: str | None = None,
        *,
        address: str = "192.0.2.1",
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> httpx2.Response:
        """Send a request from an address, with a token if there is one."""
        sent = {} if token is None else {"Authorization": f"Bearer {token}"}
        transport = httpx2.ASGITransport(self.app, client=(address, 4711))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(
                method, path, headers={**sent, **(headers or {})}, **options
            )

    async def sql(self, statement: str) -> None:
        """Run a statement in the database."""
        store: Any = self.incidents.store
        await store.transact(lambda fetch: fetch(text(statement), {}))


@asynccontextmanager
async def serving(url: str, **options: Any) -> AsyncIterator[Service]:
    """Run a service with access tokens; the options are those of `TokenAuth`."""
    async with IncidentClient.open(url, observer=PrometheusObserver()) as incidents:
        yield Service(incidents, TokenAuth(incidents, **options), metrics=True)


@pytest.fixture
async def service(migrated_sqlite_url: str) -> AsyncIterator[Service]:
    """A service that needs a token for every operation that is not open."""
    async with serving(migrated_sqlite_url) as service:
        yield service


class Counter:
    """Counts the statements of a store, and fails each while `away` is set."""

    def __init__(self, incidents: IncidentClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.away = False
        store: Any = incidents.store
        fetch = store.fetch

        async def counted(*arguments: Any) -> Any:
            self.count += 1
            if self.away:
                raise StoreUnavailable("it is away")
            return await fetch(*arguments)

        monkeypatch.setattr(store, "fetch", counted)


def path_of(operation: Operation) -> str:
    """Return a path of an operation."""
    return operation.path.replace("{incident_id}", "1").replace("{asset}", "start.js")


@pytest.mark.parametrize("operation", EVERY_OPERATION, ids=lambda operation: operation.name)
async def test_each_operation_lets_through_only_its_scopes(
    service: Service, operation: Operation
) -> None:
    """A missing, invalid, expired or revoked token gets 401; a missing scope gets 403."""
    path, needed = path_of(operation), operation.scope
    wrong = await service.token("gone")
    expired = await service.token("expired", expires_in=timedelta(hours=1))
    revoked = await service.token("revoked")
    await service.incidents.tokens.revoke("revoked")
    await service.sql("DELETE FROM incident_access_token WHERE name = 'gone'")
    await service.sql(
        "UPDATE incident_access_token SET expires_at = '2020-01-01 00:00:00' WHERE name = 'expired'"
    )
    refused = [await service.send(operation.method, path)]
    refused += [
        await service.send(operation.method, path, token)
        for token in (wrong, expired, revoked, "ik_typo", wrong[:-1] + "#")
    ]
    if needed is None:
        answered = 307 if operation.name == "index" else 200
        assert {response.status_code for response in refused} == {answered}
    else:
        assert {response.status_code for response in refused} == {401}
        challenges = [response.headers["WWW-Authenticate"] for response in refused]
        invalid = 'Bearer realm="incidentkit", error="invalid_token"'
        assert challenges == ['Bearer realm="incidentkit"', *[invalid] * 5]
        # Every wrong token gets the same answer, but for the id of the request.
        for response in refused:
            del response.headers["X-Request-ID"]
        told = [response.json() | {"request_id": ""} for response in refused]
        assert told[0]["code"] == "unauthenticated"
        assert all(problem == told[0] for problem in told)
        assert len({str(response.headers) for response in refused[1:]}) == 1
    for scope in Scope:
        response = await service.send(
            operation.method, path, await service.token(f"only-{scope}", scope)
        )
        if needed is None or scope in needed:
            assert response.status_code not in {401, 403}
        else:
            assert (response.status_code, response.json()["code"]) == (403, "insufficient_scope")
            assert (
                f'error="insufficient_scope", scope="{" ".join(sorted(needed))}"'
                in (response.headers["WWW-Authenticate"])
            )
            assert response.headers["Content-Type"] == "application/problem+json"


async def test_every_wrong_token_takes_the_same_way(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown, an expired and a revoked token cost one statement each, and a typo none."""
    tokens = {name: await service.token(name) for name in ("unknown", "expired", "revoked")}
    await service.incidents.tokens.revoke("revoked")
    await service.sql("DELETE FROM incident_access_token WHERE name = 'unknown'")
    await service.sql(
        "UPDATE incident_access_token SET expires_at = '2020-01-01 00:00:00' WHERE name = 'expired'"
    )
    counter = Counter(service.incidents, monkeypatch)
    for number, token in enumerate(tokens.values(), 1):
        assert (await service.send("GET", "/incident/get", token)).status_code == 401
        assert counter.count == number
    typo = tokens["unknown"][:-1] + ("a" if tokens["unknown"][-1] != "a" else "b")
    assert (await service.send("GET", "/incident/get", typo)).status_code == 401
    assert counter.count == 3


def test_only_these_operations_are_open() -> None:
    """An operation is open only if it is named here."""
    opened = {operation.path for operation in EVERY_OPERATION if operation.scope is None}
    docs = {"/", "/docs", "/docs/problems", "/docs/{asset}"}
    assert opened == {"/health/live", "/health/ready", "/openapi.json", *docs}


async def test_a_stranger_learns_nothing_of_the_faults_of_a_request(service: Service) -> None:
    """The token is checked before anything else in a request."""
    response = await service.send("POST", "/incident/create?unknown=1", content=b"{")
    assert response.status_code == 401
    assert response.json()["errors"] == []


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer {token}", 200),
        ("bearer  {token} ", 200),
        ("Basic {basic}", 200),
        ("basic {basic}", 200),
        ("Digest {token}", 401),
        ("{token}", 401),
        ("Bearer", 401),
        ("Basic {token}", 401),
        ("Basic %%%", 401),
        ("Bearer {token} {token}", 401),
        ("Bearer ééé", 401),
    ],
)
async def test_a_token_is_sent_as_bearer_or_as_a_password(
    service: Service, header: str, status: int
) -> None:
    """Both schemes are read in any letter case; any other scheme is an invalid token."""
    token = await service.token()
    basic = b64encode(f"anybody:{token}".encode()).decode()
    sent = header.format(token=token, basic=basic).encode("latin-1")
    headers: Any = {"Authorization": sent}
    response = await service.send("GET", "/incident/get", headers=headers)
    assert response.status_code == status


async def test_two_tokens_in_a_request_are_refused(service: Service) -> None:
    """A request with two Authorization headers is refused, even if one is valid."""
    token = await service.token()
    headers: Any = [("Authorization", f"Bearer {token}")] * 2
    transport = httpx2.ASGITransport(service.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/incident/get", headers=headers)).status_code == 401
        # A token in the query would end in the log of a proxy.
        response = await client.get("/incident/get", params={"api-key": token})
    assert response.status_code == 401


async def test_checks_within_five_seconds_need_no_statement(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests with one token share a lookup, also if they arrive together."""
    token = await service.token()
    counter = Counter(service.incidents, monkeypatch)
    await asyncio.gather(*(service.send("GET", "/health/live", token) for _ in range(3)))
    assert counter.count == 0
    answers = await asyncio.gather(
        *(service.send("GET", "/incident/history/1", token) for _ in range(20))
    )
    assert {answer.status_code for answer in answers} == {404}
    assert counter.count == 1
    for _ in range(20):
        await service.send("GET", "/incident/history/1", token)
    assert counter.count == 1
    wait(monkeypatch, 5)
    await service.send("GET", "/incident/history/1", token)
    assert counter.count == 2


def wait(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the clocks of the checks run ahead."""
    monotonic, now = time.monotonic, time.time

    class Ahead:
        monotonic = staticmethod(lambda: monotonic() + seconds)
        time = staticmethod(lambda: now() + seconds)

    monkeypatch.setattr(authentication, "time", Ahead)


async def test_a_revoked_token_works_for_at_most_five_seconds(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revocation takes effect when the last successful check is five seconds old."""
    token = await service.token()
    assert (await service.send("GET", "/incident/get", token)).status_code == 200
    await service.incidents.tokens.revoke("ci")
    assert (await service.send("GET", "/incident/get", token)).status_code == 200
    wait(monkeypatch, 5)
    for _ in range(2):
        assert (await service.send("GET", "/incident/get", token)).status_code == 401


async def test_without_a_cache_a_revocation_counts_at_once(migrated_sqlite_url: str) -> None:
    """With `max_age=0`, each request looks its token up."""
    async with serving(migrated_sqlite_url, max_age=0) as service:
        token = await service.token()
        assert (await service.send("GET", "/incident/get", token)).status_code == 200
        await service.incidents.tokens.revoke("ci")
        assert (await service.send("GET", "/incident/get", token)).status_code == 401


async def test_a_token_expires_while_its_check_counts(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expiry is compared at each use, without a statement, also while the database is away."""
    token = await service.token("ci", expires_in=timedelta(seconds=4))
    assert (await service.send("GET", "/incident/get", token)).status_code == 200
    counter = Counter(service.incidents, monkeypatch)
    wait(monkeypatch, 4)
    assert (await service.send("GET", "/incident/get", token)).status_code == 401
    counter.away = True
    wait(monkeypatch, 5)
    assert (await service.send("GET", "/incident/get", token)).status_code == 401
    assert counter.count == 0


async def test_while_the_database_is_away_only_a_recent_check_counts(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token works for the rest of its five seconds; then, like any other, it gets 503."""
    token, other = await service.token("ci"), await service.token("other")
    assert (await service.send("GET", "/incident/get", token)).status_code == 200
    counter = Counter(service.incidents, monkeypatch)
    counter.away = True
    assert (await service.send("GET", "/incident/get", token)).status_code == 200
    response = await service.send("GET", "/incident/get", other)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    wait(monkeypatch, 5)
    assert (await service.send("GET", "/incident/get", token)).status_code == 503
    counter.away = False
    assert (await service.send("GET", "/incident/get", token)).status_code == 200


async def test_only_so_many_checks_are_remembered(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest successful check is evicted; a failed one is never cached."""
    monkeypatch.setattr(authentication, "MAX_KNOWN", 2)
    names = [await service.token(str(number)) for number in range(3)]
    for token in names:
        await service.send("GET", "/incident/get", token)
    counter = Counter(service.incidents, monkeypatch)
    await service.send("GET", "/incident/get", names[2])
    await service.send("GET", "/incident/get", names[1])
    assert counter.count == 0
    await service.send("GET", "/incident/get", names[0])
    assert counter.count == 1
    await service.sql("DELETE FROM incident_access_token")
    unknown = names[1]
    wait(monkeypatch, 5)
    for tries in (1, 2):
        assert (await service.send("GET", "/incident/get", unknown)).status_code == 401
        assert counter.count == 1 + tries


async def test_failed_checks_of_an_address_are_limited(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 21st unknown token in a minute gets 429 without a statement; valid ones go on."""
    known, fresh = await service.token("known"), await service.token("fresh")
    await service.send("GET", "/incident/get", known)
    for _ in range(20):
        assert (await service.send("GET", "/incident/get", "wrong")).status_code == 401
    counter = Counter(service.incidents, monkeypatch)
    response = await service.send("GET", "/incident/get", fresh)
    assert (response.status_code, response.json()["code"]) == (429, "too_many_failed_checks")
    assert 0 < int(response.headers["Retry-After"]) <= 60
    assert counter.count == 0
    # Others behind the same proxy are not locked out, even once their check has to be repeated.
    assert (await service.send("GET", "/incident/get", known)).status_code == 200
    wait(monkeypatch, 6)
    assert (await service.send("GET", "/incident/get", known)).status_code == 200
    # Another address is not affected, and one without a token never fails a check.
    assert (await service.send("GET", "/incident/get", fresh, address="192.0.2.2")).is_success
    assert (await service.send("GET", "/incident/get")).status_code == 401
    wait(monkeypatch, 61)
    assert (await service.send("GET", "/incident/get", fresh)).status_code == 200


async def test_the_failures_of_an_ipv6_network_count_together(service: Service) -> None:
    """A host has a whole network of IPv6, so its addresses have one limit."""
    for number in range(20):
        await service.send("GET", "/incident/get", "wrong", address=f"2001:db8::{number}")
    for address, status in (("2001:db8::99", 429), ("2001:db8:0:1::1", 401)):
        response = await service.send("GET", "/incident/get", "wrong", address=address)
        assert response.status_code == status


async def test_only_some_addresses_are_counted(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count of the address that failed longest ago makes room for another one."""
    monkeypatch.setattr(authentication, "MAX_ADDRESSES", 2)
    for address in ("192.0.2.1", "192.0.2.2", "192.0.2.3"):
        await service.send("GET", "/incident/get", "wrong", address=address)
    assert list(service.auth._failures) == ["192.0.2.2", "192.0.2.3"]


async def test_the_last_use_is_recorded_beside_the_request(service: Service) -> None:
    """A check records the use of the token, and a failure to record it is ignored."""
    token = await service.token()
    before = datetime.now(UTC).replace(microsecond=0)
    await service.send("GET", "/incident/get", token)
    await asyncio.gather(*service.auth._marking)
    (used,) = await service.incidents.tokens.list()
    assert used.last_used_at is not None
    assert before <= used.last_used_at <= datetime.now(UTC)
    store: Any = service.incidents.store
    other = await service.token("other")

    async def refuse(_: Any) -> None:
        raise StoreError("the account may only read")

    store.transact = refuse
    assert (await service.send("GET", "/incident/get", other)).status_code == 200
    await asyncio.gather(*service.auth._marking)


# Who acts


async def test_the_actor_is_the_name_of_the_token(service: Service, records: Records) -> None:
    """A change is recorded under the token's name, as are the request and the client's address."""
    token = await service.token("ci", "write", "read")
    created = await service.send("POST", "/incident/create", token, json=INCIDENT)
    history = await service.send(
        "GET", created.headers["Location"].replace("get", "history"), token
    )
    assert history.json()[0]["actor"] == "ci"
    logged: Any = records.seen[-2:]
    assert [(one.actor, one.client_address) for one in logged] == [("ci", "192.0.2.1")] * 2
    assert token not in "".join(str(vars(one)) for one in records.seen)


async def test_a_token_with_act_as_names_an_actor(service: Service) -> None:
    """`X-Actor` is recorded after the token's name; another token may not send it."""
    board = await service.token("board", "write", "read", "act-as")
    headers: Any = {"X-Actor": " Zoë ".encode()}
    created = await service.send("POST", "/incident/create", board, json=INCIDENT, headers=headers)
    path = created.headers["Location"].replace("get", "history")
    assert (await service.send("GET", path, board)).json()[0]["actor"] == "board/Zoë"
    plain = await service.token("plain", "write")
    refused = await service.send("POST", "/incident/create", plain, json=INCIDENT, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (403, "actor_not_allowed")
    for wrong in (b"", b"\xff", b"a" * 250, "a\u202eb".encode()):
        faulty: Any = {"X-Actor": wrong}
        response = await service.send(
            "POST", "/incident/create", board, json=INCIDENT, headers=faulty
        )
        assert response.status_code == 422
        assert [fault["field"] for fault in response.json()["errors"]] == ["actor"]


async def test_each_token_has_idempotency_keys_of_its_own(service: Service) -> None:
    """A token never gets the answer of another one for the same key."""
    one, two = await service.token("one", "report"), await service.token("two", "report")
    made: list[int] = []
    for token in (one, two, one):
        response = await service.send(
            "POST", "/incident/create", token, json=INCIDENT, headers={"Idempotency-Key": "k"}
        )
        made.append(response.json()["incident_id"])
    assert made == [1, 2, 1]


async def test_a_reporter_sees_its_own_message_alone(service: Service) -> None:
    """The answer to a further occurrence reveals nothing that others reported."""
    await service.incidents.create(
        "The s3cret of db-1 has leaked",
        source="operator",
        dedup_key="disk",
        details={"password": "s3cret"},
    )
    answers = {}
    for scope in ("report", "write", "read"):
        scopes = {scope, "report"}
        token = await service.token(scope, *sorted(scopes))
        answers[scope] = await service.send("POST", "/incident/create", token, json=REPORTED)
        assert answers[scope].status_code == 200
    told = answers["report"]
    assert told.json() | {"created_at": "", "last_seen_at": ""} == {
        "incident_id": 1,
        "incident_message": "Disk is full on db-1",
        "incident_type": "new",
        "source": "partner",
        "created_at": "",
        "version": 1,
        "dedup_key": "disk",
        "occurrences": 1,
        "last_seen_at": "",
        "ended_at": None,
    }
    assert told.json()["created_at"] == told.json()["last_seen_at"]
    assert told.headers["ETag"] != answers["read"].headers["ETag"]
    for scope in ("write", "read"):
        assert answers[scope].json()["incident_message"] == "The s3cret of db-1 has leaked"
        assert answers[scope].json()["details"] == {"password": "s3cret"}
    report = await service.token("intake", "report")
    other = REPORTED | {"dedup_key": None, "incident_message": "The fan is loud"}
    many = await service.send("POST", "/incident/create-many", report, json=[REPORTED, other])
    messages = [incident["incident_message"] for incident in many.json()]
    assert messages == ["Disk is full on db-1", "The fan is loud"]
    own = REPORTED | {"details": {"host": "db-1"}}
    again = await service.send("POST", "/incident/create", report, json=own)
    assert again.json()["details"] == {"host": "db-1"}


async def test_readiness_tells_a_stranger_one_word(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the scope `read`, `/health/ready` says only whether the service is ready."""
    report, read = await service.token("report", "report"), await service.token("read", "read")
    for token in (None, "wrong", report):
        response = await service.send("GET", "/health/ready", token)
        assert response.json() == {"ready": True}
    full = await service.send("GET", "/health/ready", read)
    assert full.json()["database"] == {"state": "ok"}
    counter = Counter(service.incidents, monkeypatch)
    counter.away = True
    assert (await service.send("GET", "/health/ready", report)).json() == {"ready": True}
    await service.incidents.close()
    gone = await service.send("GET", "/health/ready")
    assert gone.status_code == 503
    assert set(gone.json()) == {
        "type",
        "title",
        "status",
        "detail",
        "code",
        "request_id",
        "errors",
        "ready",
    }


# Long requests


async def test_a_long_poll_of_a_revoked_token_gets_no_changes(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that is revoked while its request waits gets 401 instead of the changes."""
    token = await service.token()
    poll = asyncio.ensure_future(service.send("GET", "/incident/changes?wait=30", token))
    async with asyncio.timeout(30):
        while not service.app.readers.count:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await service.incidents.tokens.revoke("ci")
    wait(monkeypatch, 5)
    await service.incidents.create("Disk is full", source="partner")
    assert (await poll).status_code == 401


async def test_a_stream_ends_when_its_token_is_revoked(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream continues while tokens cannot be read, and sends nothing after a revocation."""
    token = await service.token()
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/incident/changes",
        "query_string": b"",
        "headers": [
            (b"authorization", f"Bearer {token}".encode()),
            (b"accept", b"text/event-stream"),
        ],
        "client": ("192.0.2.1", 4711),
    }
    sent: asyncio.Queue[Any] = asyncio.Queue()
    forever = asyncio.Event()

    async def receive() -> Any:
        await forever.wait()

    stream = asyncio.ensure_future(service.app(scope, receive, sent.put))

    async def next_body() -> bytes:
        message = await asyncio.wait_for(sent.get(), 30)
        return bytes(message.get("body", b""))

    while b"nothing new" not in await next_body():
        pass
    counter = Counter(service.incidents, monkeypatch)
    counter.away = True
    wait(monkeypatch, 5)
    await service.incidents.create("Disk is full", source="partner")
    assert b"event: created" in await next_body()
    counter.away = False
    await service.incidents.tokens.revoke("ci")
    await service.incidents.create("Disk is full again", source="partner")
    assert await next_body() == b""
    await asyncio.wait_for(stream, 30)
    forever.set()


@pytest.mark.parametrize("anonymous", ["never", "until_token"])
async def test_a_new_stream_survives_that_its_sender_cannot_be_checked(
    migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch, anonymous: str
) -> None:
    """A browser takes every status but 200 as the end, so it is asked to come back instead."""
    async with serving(migrated_sqlite_url, anonymous=anonymous) as service:
        token = await service.token() if anonymous == "never" else None
        path, stream = "/incident/changes", {"Accept": "text/event-stream"}
        counter = Counter(service.incidents, monkeypatch)
        counter.away = True
        answer = await service.send("GET", path, token, headers=stream)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        retry, comment = answer.text.split("\n\n", 1)
        assert 1000 <= int(retry.removeprefix("retry: ")) <= 3000
        assert comment == ": the database is unavailable\n\n"
        assert (await service.send("GET", path, token)).status_code == 503
        counter.away = False
        wrong = await service.send("GET", path, "wrong", headers=stream)
        assert wrong.status_code == 401


# Anonymous callers


async def test_anonymous_callers_are_let_in_until_the_first_token(
    migrated_sqlite_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first token closes the service within five seconds, for as long as it runs."""
    async with serving(migrated_sqlite_url, anonymous="until_token") as service:
        counter = Counter(service.incidents, monkeypatch)
        for _ in range(3):
            created = await service.send("POST", "/incident/create", json=INCIDENT)
            assert created.status_code == 201
        assert counter.count == 1
        path = "/incident/history/3"
        assert (await service.send("GET", path)).json()[0]["actor"] is None
        assert (await service.send("GET", "/health/ready")).json()["database"]
        for_admins: Any = ANONYMOUS.scopes
        assert sorted(for_admins) == ["read", "report", "write"]
        named = await service.send("GET", path, headers={"X-Actor": "alice"})
        assert named.status_code == 403
        token = await service.token()
        wait(monkeypatch, 5)
        assert (await service.send("GET", path)).status_code == 401
        assert (await service.send("GET", path, token)).status_code == 200
        await service.incidents.tokens.revoke("ci")
        await service.sql("DELETE FROM incident_access_token")
        wait(monkeypatch, 60)
        assert (await service.send("GET", path)).status_code == 401


async def test_a_used_token_closes_the_service_at_once(migrated_sqlite_url: str) -> None:
    """A request with a valid token shows that there is one."""
    async with serving(migrated_sqlite_url, anonymous="until_token") as service:
        assert (await service.send("GET", "/incident/get")).status_code == 200
        token = await service.token()
        assert (await service.send("GET", "/incident/get", token)).status_code == 200
        assert (await service.send("GET", "/incident/get")).status_code == 401


async def test_anonymous_callers_may_always_be_let_in(migrated_sqlite_url: str) -> None:
    """With `always`, a request without a token is answered; an invalid token is refused."""
    async with serving(migrated_sqlite_url, anonymous="always") as service:
        await service.token()
        assert (await service.send("GET", "/incident/get")).status_code == 200
        assert (await service.send("GET", "/incident/get", "wrong")).status_code == 401


# Other ways to authenticate


async def test_a_host_brings_its_own_check(migrated_sqlite_url: str, records: Records) -> None:
    """`authenticate` is any function of the scope; an exception is 503 and logged."""

    async def authenticate(scope: Any) -> Principal | None:
        name = dict(scope["headers"]).get(b"x-user", b"").decode()
        if name == "broken":
            raise RuntimeError("the directory is away")
        return Principal(name * 300, frozenset(ALL)) if name else None

    async with IncidentClient.open(migrated_sqlite_url) as incidents:
        service = Service(incidents, authenticate)
        headers = {"X-User": "z"}
        created = await service.send("POST", "/incident/create", json=INCIDENT, headers=headers)
        assert created.status_code == 201
        assert (await incidents.history(1))[0].actor == "z" * 255
        assert (await service.send("GET", "/incident/get")).status_code == 401
        broken = await service.send("GET", "/incident/get", headers={"X-User": "broken"})
        assert (broken.status_code, broken.json()["code"]) == (503, "authentication_unavailable")
        accept = {"Accept": "text/event-stream", "X-User": "broken"}
        stream = await service.send("GET", "/incident/changes", headers=accept)
        assert stream.status_code == 200
        assert ": the service cannot check who sends the request" in stream.text
        assert "directory" not in broken.text
        assert any(record.exc_info for record in records.seen)
        document = (await service.send("GET", "/openapi.json")).json()
        assert "securitySchemes" not in document["components"]
        assert "401" in document["paths"]["/incident/get"]["get"]["responses"]


async def test_the_document_declares_schemes_and_scopes(service: Service) -> None:
    """The OpenAPI document names both schemes, and the scope of each operation."""
    document = (await service.send("GET", "/openapi.json")).json()
    validate_document(document)
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert document["components"]["securitySchemes"]["basic"]["scheme"] == "basic"
    for operation in OPERATIONS:
        if operation.documented:
            described = document["paths"][operation.path][operation.method.lower()]
            enough = [scopes for each in described["security"] for scopes in each.values()]
            assert {scope for scopes in enough for scope in scopes} == (operation.scope or set())
            assert ("401" in described["responses"]) is (operation.scope is not None)
    problem = await service.send("GET", "/incident/get")
    validate(problem.json(), document["components"]["schemas"]["Problem"])
    plain = service_on(service.incidents)
    transport = httpx2.ASGITransport(plain)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        document = (await client.get("/openapi.json")).json()
        assert "security" not in str(document)
        # A mounted app without `authenticate` asks nothing.
        assert (await client.get("/incident/get")).status_code == 200


async def test_an_anonymous_caller_is_asked_for_a_token_that_may_purge(
    migrated_sqlite_url: str,
) -> None:
    """Where anonymous callers may do almost everything, the rest asks them for a token."""
    async with serving(migrated_sqlite_url, anonymous="always") as service:
        path = "/incident/purge?ended_before=2026-01-01 00:00:00"
        response = await service.send("POST", path)
    assert (response.status_code, response.json()["code"]) == (401, "unauthenticated")
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="incidentkit"'


async def test_a_foreign_host_learns_no_details_of_readiness(migrated_sqlite_url: str) -> None:
    """A page whose name leads to the service's address learns only whether it is ready."""
    async with serving(migrated_sqlite_url, anonymous="always") as service:
        service.app.add_middleware(BrowserGuard, hosts=LOOPBACK)
        own = await service.send("GET", "/health/ready", headers={"Host": "localhost"})
        foreign = await service.send("GET", "/health/ready", headers={"Host": "evil.example"})
    assert "database" in own.json()
    assert foreign.json() == {"ready": True}
