"""Idempotency keys, entity tags and conflicts over HTTP; histories, notes and actors."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.middleware.authentication import AuthenticationMiddleware

from incidentkit import IncidentClient
from incidentkit.domain.values import MAX_ID
from incidentkit.http import create_app
from incidentkit.http.operation import MAX_BODY, MAX_ITEMS
from tests.hosts import run_sql
from tests.http.conftest import DOCUMENT, INCIDENT, MEMORY, Serve, validate

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection


def update(api: httpx2.Client, status: str, **headers: str) -> httpx2.Response:
    """Change the status of the first incident."""
    params: dict[str, str | int] = {"incident_id": 1, "status": status}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return api.patch("/incident/update-status", params=params, headers=names)


def test_a_repeated_create_has_the_first_answer(serve: Serve, urls: tuple[str, str | None]) -> None:
    """A retry with an Idempotency-Key gets the same answer, and creates nothing."""
    api = serve(create_app(IncidentClient.open(*urls)))
    headers = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
    first = api.post("/incident/create", json=INCIDENT, headers=headers)
    update(api, "failed")
    second = api.post("/incident/create", json=INCIDENT, headers=headers)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.content == second.content
    for name in ("Location", "ETag"):
        assert first.headers[name] == second.headers[name]
    assert len(api.get("/incident/get").json()) == 1
    other = api.post("/incident/create", json=INCIDENT | {"source": "partner"}, headers=headers)
    assert other.status_code == 422
    assert other.json()["errors"] == [
        {"field": "idempotency_key", "reason": "was used with other parameters"}
    ]


def test_a_repeated_change_has_the_first_answer(serve: Serve, urls: tuple[str, str | None]) -> None:
    """With an Idempotency-Key a status is changed once, even if If-Match no longer holds."""
    api = serve(create_app(IncidentClient.open(*urls)))
    api.post("/incident/create", json=INCIDENT)
    headers = {"Idempotency_Key": "k", "If_Match": '"1"'}
    first = update(api, "completed", **headers)
    assert (first.status_code, first.json()["version"]) == (200, 2)
    update(api, "new")
    assert update(api, "completed", **headers).content == first.content
    assert api.get("/incident/get/1").json()["incident_type"] == "new"


def test_a_further_occurrence_is_200(serve: Serve, urls: tuple[str, str | None]) -> None:
    """The first report of a dedup_key is a 201, each further one a 200 with the count."""
    api = serve(create_app(IncidentClient.open(*urls)))
    body = INCIDENT | {"dedup_key": "disk-full:db-1"}
    answers = [api.post("/incident/create", json=body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201, 200, 200]
    assert [answer.json()["occurrences"] for answer in answers] == [1, 2, 3]
    assert {answer.headers["Location"] for answer in answers} == {"/incident/get/1"}
    update(api, "completed")
    assert api.post("/incident/create", json=body).status_code == 201
    reopened = update(api, "new")
    assert reopened.status_code == 409
    assert reopened.json()["incident"]["incident_id"] == 1
    assert "dedup_key" in reopened.json()["detail"]


def test_the_open_incident_of_a_key_is_resolved(serve: Serve, urls: tuple[str, str | None]) -> None:
    """The answer is the ended incident with its tag, and 204 where none is open."""
    api = serve(create_app(IncidentClient.open(*urls)))
    body = {"dedup_key": "disk"}
    assert api.post("/incident/resolve", json=body).status_code == 204
    api.post("/incident/create", json=INCIDENT | body)
    ended = api.post("/incident/resolve", json=body | {"status": "failed", "note": "Given up"})
    assert (ended.status_code, ended.json()["incident_type"]) == (200, "failed")
    assert ended.json() == api.get("/incident/get/1").json()
    assert ended.headers["ETag"] == api.get("/incident/get/1").headers["ETag"]
    assert api.get("/incident/history/1").json()[-1]["note"] == "Given up"
    none = api.post("/incident/resolve", json=body | {"note": None})
    assert (none.status_code, none.content) == (204, b"")


def test_many_keys_are_resolved(serve: Serve, urls: tuple[str, str | None]) -> None:
    """The answers are in the order of the keys, with null where no incident is open."""
    api = serve(create_app(IncidentClient.open(*urls)))
    for key in ("a", "b"):
        api.post("/incident/create", json=INCIDENT | {"dedup_key": key})
    many = api.post("/incident/resolve-many", json={"dedup_keys": ["b", "none", "a", "b"]})
    assert many.status_code == 200
    assert [each and each["dedup_key"] for each in many.json()] == ["b", None, "a", None]
    assert many.json()[0] == api.get("/incident/get/2").json()
    assert api.post("/incident/resolve-many", json={"dedup_keys": []}).json() == []
    most = {"dedup_keys": [f"{n}{'x' * 250}" for n in range(MAX_ITEMS)]}
    assert api.post("/incident/resolve-many", json=most).json() == [None] * MAX_ITEMS


def test_a_repeated_resolution_has_the_first_answer(
    serve: Serve, urls: tuple[str, str | None]
) -> None:
    """A retry with an Idempotency-Key gets the same answer, also if that had no content."""
    api = serve(create_app(IncidentClient.open(*urls)))
    body = {"dedup_key": "disk"}
    for status in (204, 200):
        headers = {"Idempotency-Key": f"key {status}"}
        first = api.post("/incident/resolve", json=body, headers=headers)
        many = api.post(
            "/incident/resolve-many",
            json={"dedup_keys": ["disk"]},
            headers={"Idempotency-Key": f"many {status}"},
        )
        assert first.status_code == status
        assert not {"Idempotent-Replayed"} & {*first.headers, *many.headers}
        api.post("/incident/create", json=INCIDENT | body)
        again = api.post("/incident/resolve", json=body, headers=headers)
        assert (again.status_code, again.content) == (first.status_code, first.content)
        assert again.headers["Idempotent-Replayed"] == "true"
        again = api.post(
            "/incident/resolve-many",
            json={"dedup_keys": ["disk"]},
            headers={"Idempotency-Key": f"many {status}"},
        )
        assert (again.json(), many.json()) == ([None], [None])
        assert again.headers["Idempotent-Replayed"] == "true"
    assert api.get("/incident/get/2").json()["incident_type"] == "new"


def test_a_resolution_is_read_strictly(serve: Serve) -> None:
    """Every faulty field is named, a faulty key by its place; an illegal end shows the incident."""
    api = serve(create_app(IncidentClient.open(MEMORY, transitions={"new": ["failed"]})))
    api.post("/incident/create", json=INCIDENT | {"dedup_key": "disk"})
    for path, body, faulty in (
        ("resolve", {"status": "new", "note": ""}, ["dedup_key", "status", "note"]),
        ("resolve", {"dedup_key": "", "id": 1}, ["dedup_key", "id"]),
        ("resolve", [], ["body"]),
        ("resolve-many", {"dedup_keys": ["a", "", 7]}, ["dedup_keys[1]", "dedup_keys[2]"]),
        ("resolve-many", {"dedup_keys": "disk"}, ["dedup_keys"]),
        ("resolve-many", {"dedup_keys": {"disk": 1}}, ["dedup_keys"]),
        ("resolve-many", {"dedup_keys": ["disk"] * (MAX_ITEMS + 1)}, ["dedup_keys"]),
        ("resolve-many", {"dedup_keys": ["disk"], "status": "new"}, ["status"]),
    ):
        answer = api.post(f"/incident/{path}", json=body)
        assert answer.status_code == 422
        assert [error["field"] for error in answer.json()["errors"]] == faulty
    for path, body in (
        ("resolve", {"dedup_key": "disk"}),
        ("resolve-many", {"dedup_keys": ["disk"]}),
    ):
        refused = api.post(f"/incident/{path}", json=body)
        assert (refused.status_code, refused.json()["code"]) == (409, "illegal_transition")
        assert refused.json()["incident"] == api.get("/incident/get/1").json()
    large = api.post("/incident/resolve-many", json={"dedup_keys": ["x" * 2100000]})
    assert large.status_code == 413


def test_an_entity_tag_guards_a_change(serve: Serve, urls: tuple[str, str | None]) -> None:
    """If-Match allows a change of one version only; a 412 shows the current incident."""
    api = serve(create_app(IncidentClient.open(*urls)))
    created = api.post("/incident/create", json=INCIDENT).headers["ETag"]
    assert re.fullmatch('"1-[0-9a-f]{12}"', created)
    assert api.get("/incident/get/1").headers["ETag"] == created
    changed = update(api, "failed", If_Match=created)
    assert changed.headers["ETag"].startswith('"2-')
    for outdated in (created, '"1"'):
        refused = update(api, "completed", If_Match=outdated)
        assert refused.status_code == 412
        assert refused.headers["ETag"] == changed.headers["ETag"]
        assert refused.json()["incident"] == changed.json()
    assert api.get("/incident/get/1").json() == changed.json()
    for status, tag in (("completed", '"2"'), ("failed", "*")):
        assert update(api, status, If_Match=tag).status_code == 200


def test_an_entity_tag_of_a_lost_incident_fits_no_other(
    serve: Serve, urls: tuple[str, str | None]
) -> None:
    """After a failover that lost commits, an id and a version mean another incident: 412."""
    api = serve(create_app(IncidentClient.open(*urls)))
    api.post("/incident/create", json=INCIDENT)
    lost = api.post("/incident/create", json=INCIDENT).headers["ETag"]
    asyncio.run(lose_incidents_after(urls[0], 1))
    body = INCIDENT | {"incident_message": "Another incident with the id"}
    found = api.post("/incident/create", json=body)
    assert (found.json()["incident_id"], found.json()["version"]) == (2, 1)
    patch = "/incident/update-status?incident_id=2&status=failed"
    refused = api.patch(patch, headers={"If-Match": lost})
    assert refused.status_code == 412
    assert refused.json()["incident"] == found.json()
    assert api.get("/incident/history/2").json()[-1]["kind"] == "created"
    # The same with a change that was lost, and another one after it.
    assert api.patch(patch, headers={"If-Match": found.headers["ETag"]}).status_code == 200
    lost = api.get("/incident/get/2").headers["ETag"]
    asyncio.run(
        run_sql(
            urls[0], "UPDATE \"Incident\" SET incident_type = 'completed' WHERE incident_id = 2"
        )
    )
    assert api.patch(patch, headers={"If-Match": lost}).status_code == 412
    assert api.patch(patch, headers={"If-Match": '"2"'}).status_code == 200


async def lose_incidents_after(url: str, incident_id: int) -> None:
    """Bring the incidents back to the state in which this one was the last."""
    await run_sql(url, f'DELETE FROM "Incident" WHERE incident_id > {incident_id}')
    await run_sql(url, f"DELETE FROM incident_event WHERE incident_id > {incident_id}")
    await run_sql(
        url,
        f"UPDATE sqlite_sequence SET seq = {incident_id} WHERE name = 'Incident'"
        if url.startswith("sqlite")
        else f"SELECT setval('\"Incident_incident_id_seq\"', {incident_id})",
    )


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
@pytest.mark.parametrize("tags", ["1", "", "**", '*, "1"', '"1" "2"', '"1', "w/'1'", ",", '"a b"'])
def test_what_is_no_entity_tag_is_refused(api: httpx2.Client, header: str, tags: str) -> None:
    """A precondition takes a list of entity tags or a star."""
    answer = update(api, "failed", **{header.replace("-", "_"): tags})
    assert answer.status_code == 422
    field = header.lower().replace("-", "_")
    assert [error["field"] for error in answer.json()["errors"]] == [field]


def test_a_header_that_is_given_twice_is_refused(api: httpx2.Client) -> None:
    """A request with two keys is refused."""
    headers = httpx2.Headers([("Idempotency-Key", "a"), ("Idempotency-Key", "b")])
    answer = api.post("/incident/create", json=INCIDENT, headers=headers)
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"field": "idempotency_key", "reason": "must be given only once"}
    ]


def test_a_change_that_the_graph_lacks_is_409(serve: Serve) -> None:
    """An illegal change of the status is a 409 with the current incident."""
    api = serve(create_app(IncidentClient.open(MEMORY, transitions={"new": ["completed"]})))
    created = api.post("/incident/create", json=INCIDENT).json()
    refused = update(api, "failed")
    assert refused.status_code == 409
    assert refused.json()["incident"] == created
    assert refused.json()["detail"] == "Incident 1 cannot go from new to failed"
    assert update(api, "completed").status_code == 200


def test_histories_and_notes(serve: Serve, urls: tuple[str, str | None]) -> None:
    """A history is read oldest event first, in pages if wanted; a note is added to it."""
    api = serve(create_app(IncidentClient.open(*urls)))
    api.post("/incident/create", json=INCIDENT)
    api.patch(
        "/incident/update-status",
        params={"incident_id": 1, "status": "failed", "note": "Диск"},
    )
    noted = api.post("/incident/note/1", json={"note": " A new disk is ordered "})
    assert noted.status_code == 201
    assert noted.json()["note"] == "A new disk is ordered"
    events = api.get("/incident/history/1").json()
    assert [event["kind"] for event in events] == ["created", "status_changed", "noted"]
    assert events[1]["note"] == "Диск"
    assert events[2] == noted.json()
    rest = api.get("/incident/history/1", params={"after": events[0]["cursor"], "limit": 1})
    assert rest.json() == events[1:2]
    assert api.get("/incident/history/1", params={"after": events[2]["cursor"]}).json() == []
    assert api.get("/incident/history/2").status_code == 404
    assert api.post("/incident/note/2", json={"note": "nobody"}).status_code == 404


def test_a_repeated_note_is_added_once(serve: Serve, urls: tuple[str, str | None]) -> None:
    """A retry of a note with an Idempotency-Key gets the first event again."""
    api = serve(create_app(IncidentClient.open(*urls)))
    api.post("/incident/create", json=INCIDENT)
    headers = {"Idempotency-Key": "k"}
    first, again = (
        api.post("/incident/note/1", json={"note": "It is hot"}, headers=headers) for _ in range(2)
    )
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.content == again.content
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert len(api.get("/incident/history/1").json()) == 2
    other = api.post("/incident/note/1", json={"note": "It is cold"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_a_change_travels_in_the_body(serve: Serve, urls: tuple[str, str | None]) -> None:
    """A change may be JSON, whole or in part, so that no proxy logs its text."""
    api = serve(create_app(IncidentClient.open(*urls)))
    api.post("/incident/create", json=INCIDENT)
    path = "/incident/update-status"
    whole = {"incident_id": 1, "status": "failed", "note": "The disk of Ann is full"}
    assert api.patch(path, json=whole).json()["incident_type"] == "failed"
    part = {"note": "It is empty again"}
    assert api.patch(f"{path}?incident_id=1&status=new", json=part).status_code == 200
    assert api.patch(f"{path}?incident_id=1", json={"status": "failed", "note": None}).is_success
    notes = [event["note"] for event in api.get("/incident/history/1").json()]
    assert notes == [None, whole["note"], part["note"], None]
    operation = DOCUMENT["paths"][path]["patch"]
    described = operation["requestBody"]["content"]["application/json"]["schema"]
    for body in (whole, part, {"status": "failed", "note": None}):
        validate(body, described)


@pytest.mark.parametrize("number", ["1.0", "0.1e1", "10E-1", "1.000000000000000000000"])
def test_an_integer_may_have_a_fraction_of_zero(serve: Serve, number: str) -> None:
    """A number in a body is an integer if JSON Schema takes it for one."""
    api = serve(create_app(IncidentClient.open(MEMORY)))
    api.post("/incident/create", json=INCIDENT)
    body = f'{{"incident_id": {number}, "status": "failed"}}'
    declared = {"Content-Type": "application/json"}
    answer = api.patch("/incident/update-status", content=body, headers=declared)
    assert (answer.status_code, answer.json()["incident_id"]) == (200, 1)


@pytest.mark.parametrize(
    "number", ["1.5", "9007199254740992.0", "9223372036854775808.0", "1e999999999", "-1.0"]
)
def test_another_number_is_not_an_id(api: httpx2.Client, number: str) -> None:
    """A number that is not exactly an id is refused."""
    body = f'{{"incident_id": {number}, "status": "failed"}}'
    declared = {"Content-Type": "application/json"}
    answer = api.patch("/incident/update-status", content=body, headers=declared)
    (fault,) = answer.json()["errors"]
    assert fault["reason"] == f"must be an integer from 1 to {MAX_ID}"


@pytest.mark.parametrize(
    ("query", "body", "faults"),
    [
        ("", {}, {"incident_id": "is required", "status": "is required"}),
        (
            "incident_id=1&status=new&note=a",
            {"incident_id": 1, "status": "new"},
            dict.fromkeys(
                ["incident_id", "status"], "must be in the query or in the body, not in both"
            ),
        ),
        ("incident_id=1", {"status": "x"}, {"status": "must be one of: new, completed, failed"}),
        (
            "status=new",
            {"incident_id": "1"},
            {"incident_id": f"must be an integer from 1 to {MAX_ID}"},
        ),
        ("status=new", {"incident_id": 1, "note": 7}, {"note": "must be a string"}),
        (
            "",
            {"incident_id": 1, "status": "new", "limit": 1, "body": 2},
            {"limit": "is not a known field", "body": "is not a known field"},
        ),
        ("incident_id=1&status=new", [], {"body": "must be a JSON object"}),
    ],
)
def test_a_faulty_change_is_refused(
    api: httpx2.Client, query: str, body: Any, faults: dict[str, str]
) -> None:
    """A change in a body is read as strictly as one in a query, and a name is in one of them."""
    answer = api.patch(f"/incident/update-status?{query}", json=body)
    assert answer.status_code == 422
    assert {error["field"]: error["reason"] for error in answer.json()["errors"]} == faults


def test_a_name_that_a_body_repeats_is_refused(api: httpx2.Client) -> None:
    """A JSON body names each field once, and is declared as JSON."""
    body = b'{"incident_id": 1, "status": "new", "status": "failed"}'
    declared = {"Content-Type": "application/json"}
    answer = api.patch("/incident/update-status", content=body, headers=declared)
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"field": "status", "reason": "must be given only once"}]
    assert api.patch("/incident/update-status", content=body).status_code == 415
    huge = b" " * MAX_BODY + body
    answer = api.patch("/incident/update-status", content=huge, headers=declared)
    assert answer.json()["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("body", "field"),
    [({}, "note"), ({"note": " "}, "note"), ({"note": "x", "by": "me"}, "by"), ([], "body")],
)
def test_a_faulty_note_is_refused(api: httpx2.Client, body: Any, field: str) -> None:
    """A note is an object with one text field."""
    answer = api.post("/incident/note/1", json=body)
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]


class ByHeader(AuthenticationBackend):
    """A host's authentication."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        """Take the user from a header."""
        name = conn.headers.get("X-User")
        return (AuthCredentials(), SimpleUser(name)) if name else None


def test_the_authenticated_user_is_the_actor(serve: Serve) -> None:
    """The history has the user that the host's middleware has authenticated for each request."""
    app = create_app(IncidentClient.open(MEMORY))
    api = serve(AuthenticationMiddleware(app, backend=ByHeader()))
    api.post("/incident/create", json=INCIDENT, headers={"X-User": "alice"})
    update(api, "failed", X_User="bob")
    api.post("/incident/note/1", json={"note": "by nobody"})
    events = api.get("/incident/history/1").json()
    assert [event["actor"] for event in events] == ["alice", "bob", None]


@pytest.mark.parametrize(("name", "actor"), [("x" * 300, "x" * 255), ("", None)])
def test_a_name_that_does_not_fit_does_not_fail_the_request(
    serve: Serve, name: str, actor: str | None
) -> None:
    """A user with a long or an empty name is served; the history has as much as fits."""

    class Named(AuthenticationBackend):
        async def authenticate(
            self,
            conn: HTTPConnection,  # noqa: ARG002
        ) -> tuple[AuthCredentials, SimpleUser]:
            return AuthCredentials(), SimpleUser(name)

    api = serve(AuthenticationMiddleware(create_app(IncidentClient.open(MEMORY)), backend=Named()))
    assert api.post("/incident/create", json=INCIDENT).status_code == 201
    (event,) = api.get("/incident/history/1").json()
    assert event["actor"] == actor


async def test_concurrent_requests_keep_their_actors() -> None:
    """Concurrent requests never get each other's user."""
    client = IncidentClient.open(MEMORY)
    app = AuthenticationMiddleware(create_app(client), backend=ByHeader())
    async with (
        client,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://service") as api,
    ):
        users = [f"user {number}" for number in range(20)]
        answers = await asyncio.gather(
            *(
                api.post("/incident/create", json=INCIDENT, headers={"X-User": user})
                for user in users
            )
        )
        for user, answer in zip(users, answers, strict=True):
            (event,) = await client.history(answer.json()["incident_id"])
            assert event.actor == user


def test_many_incidents_are_created_at_once(serve: Serve, urls: tuple[str, str | None]) -> None:
    """An array of incidents is stored in its order, all or none, and once with a key."""
    api = serve(create_app(IncidentClient.open(*urls)))
    disk = INCIDENT | {"dedup_key": "disk"}
    bodies = [INCIDENT, disk, disk, INCIDENT | {"source": "partner"}]
    headers = {"Idempotency-Key": "k"}
    first = api.post("/incident/create-many", json=bodies, headers=headers)
    assert first.status_code == 201
    assert [each["occurrences"] for each in first.json()] == [1, 1, 2, 1]
    assert [each["source"] for each in first.json()] == [each["source"] for each in bodies]
    again = api.post("/incident/create-many", json=bodies, headers=headers)
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert api.post("/incident/create-many", json=[disk]).status_code == 200
    assert api.post("/incident/create-many", json=[]).json() == []
    assert len(api.get("/incident/get").json()) == 3


def test_one_faulty_incident_refuses_all(api: httpx2.Client) -> None:
    """Each fault of the first faulty incidents is named with its place, and nothing is stored."""
    bodies: list[Any] = [INCIDENT] * 3 + [{"source": "x", "y": 1}, 7] + [INCIDENT]
    refused = api.post("/incident/create-many", json=bodies)
    assert refused.status_code == 422
    assert [error["field"] for error in refused.json()["errors"]] == [
        "incidents[3].incident_message",
        "incidents[3].source",
        "incidents[3].y",
        "incidents[4]",
    ]
    many = api.post("/incident/create-many", json=[{}] * MAX_ITEMS)
    places = [error["field"] for error in many.json()["errors"]]
    assert places[-1] == "incidents[9].source"
    assert len(places) == 20
    assert api.get("/incident/get").json() == []


def test_the_bounds_of_many_incidents(serve: Serve) -> None:
    """A body has a maximum of incidents and of bytes, larger than that of one incident."""
    api = serve(create_app(IncidentClient.open(MEMORY)))
    long = {"incident_message": "\N{EGG}" * 500, "source": "operator"}
    stored = api.post("/incident/create-many", json=[long] * MAX_ITEMS, timeout=60)
    assert len(stored.json()) == MAX_ITEMS
    many = api.post("/incident/create-many", json=[INCIDENT] * (MAX_ITEMS + 1))
    assert many.status_code == 422
    assert many.json()["errors"] == [{"field": "body", "reason": "must have at most 1000 items"}]
    headers = {"Content-Type": "application/json"}
    huge = api.post("/incident/create-many", content=b" " * 2**21 + b"[]", headers=headers)
    assert (huge.status_code, huge.json()["code"]) == (413, "body_too_large")
    assert huge.json()["detail"] == "The body must be at most 2097152 bytes"
    one = api.post("/incident/create-many", json=INCIDENT)
    assert one.json()["errors"] == [{"field": "body", "reason": "must be a JSON array"}]
