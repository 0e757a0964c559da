"""Build the distributions, and install the wheel away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

import incidentkit

if TYPE_CHECKING:
    from email.message import Message

ROOT = Path(__file__).resolve().parent.parent
VERSION = incidentkit.__version__
DIST_INFO = f"incidentkit-{VERSION}.dist-info"


@frozen
class Distributions:
    """The published distributions."""

    sdist: Path
    wheel: Path

    @property
    def wheel_files(self) -> dict[str, bytes]:
        """The files of the wheel, by name."""
        with zipfile.ZipFile(self.wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    @property
    def sdist_files(self) -> set[str]:
        """The names of the files of the sdist, below its one folder."""
        with tarfile.open(self.sdist) as archive:
            names = [Path(name).parts for name in archive.getnames()]
        assert {parts[0] for parts in names} == {f"incidentkit-{VERSION}"}
        return {Path(*parts[1:]).as_posix() for parts in names}

    @property
    def metadata(self) -> Message:
        """The metadata of the wheel."""
        return message_from_bytes(self.wheel_files[f"{DIST_INFO}/METADATA"])


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None, timeout: float = 120
) -> str:
    """Run a command that must succeed, and return its output."""
    process = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def build(source: Path, target: str, into: Path) -> Path:
    """Build a distribution of the source with the tool that pip would use."""
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", into, cwd=source)
    (built,) = into.iterdir()
    return built


def unpacked(sdist: Path, into: Path) -> Path:
    """Unpack the sdist, and return its folder."""
    run(sys.executable, "-m", "tarfile", "-e", sdist, into, cwd=into)
    return into / f"incidentkit-{VERSION}"


def run_installed(program: str | Path, *arguments: str, cwd: Path, timeout: float = 120) -> str:
    """Run a program without variables that could lead to the checkout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return run(program, *arguments, cwd=cwd, env=env, timeout=timeout)


def install(wheel: Path, into: Path) -> Path:
    """Install the wheel in a new virtual environment with its dependencies; return its programs."""
    venv.create(into, symlinks=True)
    programs = into / "bin"
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "install")
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check", "--no-cache-dir")
    run(*pip, *offline, wheel, cwd=into)
    # Nested .pth files are not read, so an editable install of the checkout stays hidden.
    (packages,) = into.glob("lib/python*/site-packages")
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(paths), "utf-8")
    return programs
