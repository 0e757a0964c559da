"""The commands for access tokens: what they print, and their exit codes."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from incidentkit.domain import tokens
from tests.hosts import run_sql
from tests.test_cli import errors, output, run

if TYPE_CHECKING:
    from click.testing import Result


@pytest.fixture(autouse=True)
def _database(migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a database with the newest schema, which every command uses without an option."""
    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", migrated_sqlite_url)


def created(*arguments: str) -> Result:
    """Create a token and return the result of the command, which must succeed."""
    result = run("token", "create", *arguments)
    assert result.exit_code == 0, result.stderr
    return result


def test_a_token_is_the_whole_output() -> None:
    """The token alone goes to stdout, so that it can be written to a file."""
    result = created("ci", "--scope", "report", "--scope", "read", "--expires", "15m")
    assert tokens.is_token(result.stdout.removesuffix("\n"))
    assert re.fullmatch(
        r"Keep the token now: it is not shown again\. It expires at [-\d]+ [:\d]+ UTC\.\n",
        result.stderr,
    )
    assert created("board", "--scope", "read").stderr.endswith("It does not expire.\n")


@pytest.mark.parametrize(("age", "days"), [("15m", 15 / 1440), ("12h", 0.5), ("90d", 90)])
def test_a_token_expires_after_an_age(age: str, days: float) -> None:
    """An age is a number with the letter of its unit."""
    fields = json.loads(created("ci", "--scope", "read", "--expires", age, "--json").stdout)
    assert tokens.is_token(fields["token"])
    lasts = datetime.fromisoformat(fields["expires_at"]) - datetime.fromisoformat(
        fields["created_at"]
    )
    assert lasts.total_seconds() == days * 86400


def test_tokens_are_listed_without_their_secrets(migrated_sqlite_url: str) -> None:
    """The list has name, scopes, times and state; JSON has the same."""
    secrets = [
        created(name, "--scope", "write", "--scope", "read", "--expires", "1h").stdout.strip()
        for name in ("active", "expired", "revoked")
    ]
    asyncio.run(
        run_sql(
            migrated_sqlite_url,
            "UPDATE incident_access_token SET expires_at = '2020-01-01 00:00:00' "
            "WHERE name = 'expired'",
        )
    )
    assert output("token", "revoke", "revoked") == "Revoked revoked.\n"
    heading, *lines = output("token", "list").splitlines()
    assert heading.split() == [
        "name",
        "scopes",
        "created_at",
        "expires_at",
        "last_used_at",
        "state",
    ]
    assert [(line.split()[:2], line.split()[-1]) for line in lines] == [
        ([name, "read,write"], name) for name in ("active", "expired", "revoked")
    ]
    listed = json.loads(output("token", "list", "--json"))
    assert [each["state"] for each in listed] == ["active", "expired", "revoked"]
    assert not [secret for secret in secrets if secret in str(listed) + str(lines)]


def test_an_expired_token_that_lost_its_name_was_not_revoked(migrated_sqlite_url: str) -> None:
    """A token stays expired once another one has taken its name."""
    created("ci", "--scope", "read", "--expires", "1h")
    asyncio.run(
        run_sql(
            migrated_sqlite_url,
            "UPDATE incident_access_token SET expires_at = '2020-01-01 00:00:00'",
        )
    )
    created("ci", "--scope", "read")
    listed = json.loads(output("token", "list", "--json"))
    assert [each["state"] for each in listed] == ["expired", "active"]


def test_without_tokens_the_list_says_so() -> None:
    """An empty list is one line on stderr."""
    result = run("token", "list")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "No tokens.\n")


def test_wrong_tokens_are_refused() -> None:
    """A missing, unknown or faulty argument is named; an unknown name is a failure."""
    assert errors("token", "revoke", "ci", exit_code=1) == ["Error: No active token is named ci"]
    created("ci", "--scope", "read")
    taken = errors("token", "create", "ci", "--scope", "read", exit_code=2)
    assert taken == [
        "Error: name belongs to an active token: revoke it first, or choose another name"
    ]
    (told,) = errors("token", "create", "a/b", "--scope", "read", exit_code=2)
    assert told.startswith("Error: name must have 1 to 64 characters")
    for arguments, named in (
        (["ci"], "Missing option '--scope'"),
        (["ci", "--scope", "fly"], "Invalid value for '--scope'"),
        (["ci", "--scope", "read", "--expires", "soon"], "Invalid value for '--expires'"),
    ):
        told = " ".join(errors("token", "create", *arguments, exit_code=2))
        assert named in told
