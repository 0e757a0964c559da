"""Fetches the files of Swagger UI from the npm registry into ``incidentkit/http/swagger_ui``.

Run it to renew them: ``python scripts/renew_swagger_ui.py``, or with a version. It needs ``npm``,
which checks what it downloads. The manifest has the version and the SHA-256 of each file before it
is compressed, as ``sha256sum`` prints it, so that anyone can compare them with the package.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

PACKAGE: Final = "swagger-ui-dist"
TARGET: Final = Path(__file__).parents[1] / "incidentkit" / "http" / "swagger_ui"

COMPRESSED: Final = ("swagger-ui-bundle.js", "swagger-ui.css")
AS_THEY_ARE: Final = ("favicon-32x32.png", "swagger-ui-bundle.js.LICENSE.txt", "LICENSE", "NOTICE")
"""The files that the page needs, and what their licenses ask to be passed on."""


def fetch(version: str) -> tuple[str, dict[str, bytes]]:
    """Return the exact version of the package, and the content of its files."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm is not installed: apt-get install -y npm")
    with TemporaryDirectory() as folder:
        packed = subprocess.run(  # noqa: S603
            [npm, "pack", "--json", f"{PACKAGE}@{version}"],
            cwd=folder,
            stdout=subprocess.PIPE,
            check=True,
        )
        (about,) = json.loads(packed.stdout)
        with tarfile.open(Path(folder, about["filename"])) as archive:
            content = {
                name: file.read()
                for name in (*COMPRESSED, *AS_THEY_ARE)
                if (file := archive.extractfile(f"package/{name}")) is not None
            }
    return about["version"], content


def main(version: str = "latest") -> None:
    """Replace the files, and the manifest."""
    exact, content = fetch(version)
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir()
    for name, data in content.items():
        if name in COMPRESSED:
            # Without a time, so that the same version gives the same file.
            (TARGET / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            (TARGET / name).write_bytes(data)
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in content.items()]
    (TARGET / "manifest.txt").write_text(f"# {PACKAGE} {exact}\n{''.join(lines)}", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
