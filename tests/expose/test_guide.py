"""The commands of the guide "Expose the service" print what the guide shows."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx2

from tests.servers import free_port
from tests.test_docs import Fence, fences

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

GUIDE: Final = "docs/how-to/expose.md"
PORTS: Final = ("8000", "8443", "9090")
DEADLINE: Final = 60.0
"""Seconds after which an answer that has to come counts as missing."""

CHANGING: Final = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


def test_the_guide_does_what_it_shows(tmp_path: Path) -> None:
    """Each command of the page is run as it stands there, but on free ports."""
    replaced = {port: str(free_port()) for port in PORTS}
    with ExitStack() as proxy, ExitStack() as background:
        proxy.callback(_run, "nginx -p . -c nginx.conf -s stop", tmp_path)
        for fence in fences(GUIDE):
            text = _replace(fence.text, replaced)
            if fence.file is not None:
                (tmp_path / fence.file).write_text(text)
            elif "background" in fence.words:
                (command,) = _commands(text)
                if command.startswith("incidentkit"):
                    # The service takes the place of the one before.
                    background.close()
                background.enter_context(_running(command, tmp_path))
                if command.startswith("incidentkit"):
                    _wait_for(int(replaced["8000"]))
            elif "expose" in fence.words:
                for command, expected in _commands(text).items():
                    _check(command, expected, tmp_path, fence)


def _replace(text: str, replaced: Mapping[str, str]) -> str:
    for port, free in replaced.items():
        text = re.sub(rf"(?<=:){port}\b|(?<=listen ){port}\b", free, text)
    return text.replace("incidentkit serve", f"incidentkit serve --port {replaced['8000']}")


def _commands(text: str) -> dict[str, str]:
    """Return each command of a block with what it prints."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def _check(command: str, expected: str, folder: Path, fence: Fence) -> None:
    """Run a command, and compare what it prints; the service may need some seconds to notice."""
    deadline = time.monotonic() + DEADLINE
    wanted = CHANGING.sub("<time>", expected)
    while True:
        printed = CHANGING.sub("<time>", _run(command, folder))
        if printed.strip() == wanted.strip():
            return
        late = time.monotonic() > deadline
        assert command.startswith("curl") and not late, f"{fence}: {command}\n{printed}"  # noqa: PT018
        time.sleep(0.2)


def _wait_for(port: int) -> None:
    """Wait until the service answers."""
    deadline = time.monotonic() + DEADLINE
    while True:
        with suppress(httpx2.TransportError):
            httpx2.get(f"http://127.0.0.1:{port}/health/live")
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    own = {name: value for name, value in os.environ.items() if "INCIDENTKIT" not in name}
    return {**own, "PATH": path}


def _run(command: str, folder: Path) -> str:
    """Return what a command of the page prints; errors too, but for notes beside a result."""
    done = subprocess.run(
        ["bash", "-c", f"umask 077; {command}"],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr


@contextmanager
def _running(command: str, folder: Path) -> Iterator[None]:
    """Run a command in another terminal, until somebody presses Ctrl+C there."""
    log = folder / f"{command.split(maxsplit=1)[0]}.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=_environment(),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(DEADLINE)
    assert process.returncode in {0, -signal.SIGINT}, log.read_text()
