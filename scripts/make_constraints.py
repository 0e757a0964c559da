"""Writes ``constraints.txt``: the exact version of every package in the image.

Run it with the Python of the image, to take up new versions:
``python3.13 scripts/make_constraints.py``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
TARGET: Final = ROOT / "constraints.txt"
BUILD: Final = "hatchling"
"""What builds the wheel that the image installs."""

HEADER: Final = """\
# The packages of the image. scripts/make_constraints.py writes this file with Python {version}.
"""


def image_python() -> str:
    """Return the version of Python that the Dockerfile names, such as ``3.13``."""
    found = re.search(
        r"^FROM python:(\d+\.\d+)", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE
    )
    if found is None:
        raise SystemExit("The Dockerfile names no version of Python")
    return found[1]


def resolve() -> dict[str, str]:
    """Return the newest version of each package that the project and its extras allow."""
    command = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    report = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "pip", *command, f"{ROOT}[all]", BUILD],
        stdout=subprocess.PIPE,
        check=True,
    )
    found = [each["metadata"] for each in json.loads(report.stdout)["install"]]
    return {
        each["name"].lower(): each["version"] for each in found if each["name"] != "incidentkit"
    }


def main() -> None:
    """Write the file."""
    version = image_python()
    if version != f"{sys.version_info.major}.{sys.version_info.minor}":
        raise SystemExit(f"Run this script with Python {version}, which the image has")
    lines = [f"{name}=={pin}\n" for name, pin in sorted(resolve().items())]
    TARGET.write_text(HEADER.format(version=version) + "".join(lines), "utf-8")


if __name__ == "__main__":
    main()
