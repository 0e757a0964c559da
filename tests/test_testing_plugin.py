"""The fixtures of the test kit, in test runs of applications that use incidentkit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.distributions import ROOT, Distributions, run_installed
from tests.test_imports import modules_after

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

pytest_plugins = "pytester"

SYNCHRONOUS: Final = """
import asyncio

from incidentkit import SyncIncidentClient
from incidentkit.testing import assert_incident_opened, assert_no_incident


def test_an_incident_is_recorded(incidents):
    assert_no_incident(incidents)
    incidents.create("Disk is full", source="monitoring")
    assert_incident_opened(incidents, message="Disk is full")


def test_each_test_has_its_own_database(incidents):
    assert_no_incident(incidents)


def test_both_clients_of_a_test_share_a_database(incidents, async_incidents):
    asyncio.run(async_incidents.create("Disk is full", source="monitoring"))
    assert_incident_opened(incidents, source="monitoring")
    asyncio.run(async_incidents.update_status(1, "completed"))
    assert_incident_opened(incidents, status="completed")


def test_several_clients_open_the_url(incidentkit_url):
    with (
        SyncIncidentClient.open(incidentkit_url) as incidents,
        SyncIncidentClient.open(incidentkit_url) as others,
    ):
        others.create("Disk is full", source="partner")
        assert_incident_opened(incidents, source="partner")
"""
"""Works without any other plugin."""

ASYNCHRONOUS: Final = """
import pytest

from incidentkit.testing import assert_history, assert_incident_opened, assert_no_incident

{mark}

{fixture}
async def incident(async_incidents):
    return await async_incidents.create("Disk is full", source="monitoring")


async def test_an_incident_is_recorded(async_incidents, incident):
    await async_incidents.update_status(incident.incident_id, "completed")
    assert await async_incidents.list() == [await async_incidents.get(incident.incident_id)]
    found = await assert_incident_opened(async_incidents, status="completed")
    await assert_history(async_incidents, found, ["created", "status_changed"])


async def test_each_test_has_its_own_database(async_incidents):
    await assert_no_incident(async_incidents)


async def test_the_client_can_be_entered(async_incidents):
    async with async_incidents as client:
        await client.create("Disk is full", source="monitoring")
    await assert_incident_opened(async_incidents)
"""
"""Needs a plugin that runs coroutines."""

ASYNCIO: Final = (
    "-p",
    "pytest_asyncio.plugin",
    "-o",
    "asyncio_default_fixture_loop_scope=function",
)

WAYS: Final = {
    "asyncio-strict": (
        "pytestmark = pytest.mark.asyncio\nimport pytest_asyncio",
        "@pytest_asyncio.fixture",
        (*ASYNCIO, "-o", "asyncio_mode=strict"),
    ),
    "asyncio-auto": ("", "@pytest.fixture", (*ASYNCIO, "-o", "asyncio_mode=auto")),
    "anyio": (
        "pytestmark = pytest.mark.anyio\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'",
        "@pytest.fixture",
        ("-p", "anyio.pytest_plugin"),
    ),
}
"""The mark of asynchronous tests, that of their fixtures, and the options, by plugin."""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """The folder of an application; only the plugins that a test names are loaded there."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("COVERAGE_PROCESS_CONFIG", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    return pytester


def run(project: pytest.Pytester, *options: str) -> pytest.RunResult:
    """Run the tests of a project, where every warning is an error."""
    plugin = ("-p", "incidentkit.testing.plugin", "-p", "no:cacheprovider")
    return project.runpytest_subprocess(*plugin, "-W", "error", *options, timeout=100)


def test_an_unused_plugin_loads_nothing_but_pytest() -> None:
    """Besides pytest, the plugin loads only four nearly empty modules of incidentkit."""
    code = "import pytest; before.update(sys.modules); import incidentkit.testing.plugin"
    assert modules_after(code) == {
        "incidentkit",
        "incidentkit.lazy",
        "incidentkit.testing",
        "incidentkit.testing.plugin",
    }


def test_synchronous_tests_have_their_fixtures(project: pytest.Pytester) -> None:
    """Each test has a private database, in the workers of pytest-xdist too."""
    project.makepyfile(SYNCHRONOUS)
    run(project, "-p", "xdist.plugin", "-n", "2").assert_outcomes(passed=4)


@pytest.mark.parametrize("way", WAYS)
def test_asynchronous_tests_have_their_fixture(project: pytest.Pytester, way: str) -> None:
    """The asynchronous client works with each plugin that runs coroutines, in each mode."""
    mark, fixture, options = WAYS[way]
    project.makepyfile(ASYNCHRONOUS.format(mark=mark, fixture=fixture))
    run(project, *options).assert_outcomes(passed=3)


def test_fixtures_of_the_application_win(project: pytest.Pytester) -> None:
    """A fixture of the same name in a conftest or a module replaces the kit's."""
    project.makeconftest("import pytest\n@pytest.fixture\ndef incidents():\n    return 'conftest'")
    project.makepyfile(
        """
        import pytest

        @pytest.fixture
        def async_incidents():
            return "module"

        def test_names(incidents, async_incidents):
            assert (incidents, async_incidents) == ("conftest", "module")
        """
    )
    run(project).assert_outcomes(passed=1)


def test_a_failed_assertion_shows_the_test_alone(project: pytest.Pytester) -> None:
    """A failure shows the line of the test and what was found, and no line of the kit."""
    project.makepyfile(
        """
        from incidentkit.testing import assert_incident_opened

        def test_disk(incidents):
            incidents.create("Disk is full", source="partner")
            assert_incident_opened(incidents, source="monitoring")
        """
    )
    result = run(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [">       assert_incident_opened(incidents, source=*", "E*found 0 among 1:", "E*! source*"]
    )
    result.stdout.no_fnmatch_line("*incidentkit/testing/*")


def test_the_installed_package_brings_the_fixtures(
    distributions: Distributions, environment: Path, tmp_path: Path
) -> None:
    """An installed incidentkit announces its plugin, which works beside all installed plugins."""
    (entry_points,) = (
        text for name, text in distributions.wheel_files.items() if "entry_points" in name
    )
    assert b"[pytest11]\nincidentkit = incidentkit.testing.plugin" in entry_points
    (tmp_path / "test_application.py").write_text(SYNCHRONOUS, "utf-8")
    options = ("-q", "-W", "error", "-o", "asyncio_default_fixture_loop_scope=function")
    output = run_installed(environment / "python", "-m", "pytest", *options, cwd=tmp_path)
    assert "4 passed" in output
