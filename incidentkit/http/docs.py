"""Serve the pages for people: the bundled Swagger UI, and the kinds of problems.

The browser loads nothing from elsewhere.
"""

from __future__ import annotations

import gzip
import re
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from starlette.exceptions import HTTPException
from starlette.responses import Response

from incidentkit.domain.errors import InvalidSettings
from incidentkit.wire.kinds import Kind

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

START_SCRIPT: Final = "start.js"

MEDIA_TYPES: Final = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
    START_SCRIPT: "text/javascript",
}
"""The files of the page; all but the start script come from ``scripts/renew_swagger_ui.py``."""

FOLDER: Final[Traversable] = files("incidentkit.http") / "swagger_ui"
"""The folder of the files, which may be in a zip file. Compressed files end with
``.gz``."""

_ENCODING: Final = re.compile(r"\s*([\w*-]+)\s*(?:;\s*q=(0(?:\.\d*)?|1(?:\.0*)?)\s*)?")

# Every link is relative, so that the page works wherever the app is mounted.
_PAGE: Final = f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>incidentkit</title>
<link rel="icon" type="image/png" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/{START_SCRIPT}"></script>
</body>
</html>
"""

_KINDS: Final = "\n".join(
    f'<dt id="{kind.anchor}"><code>{kind.code}</code>, status {kind.status}</dt>\n'
    f"<dd>{escape(kind.when[0].upper() + kind.when[1:])}.</dd>"
    for kind in Kind
)

_START: Final = """\
"use strict";
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
"""


_PROBLEMS: Final = f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>incidentkit: kinds of problems</title>
<link rel="icon" type="image/png" href="favicon-32x32.png">
</head>
<body>
<h1>Kinds of problems</h1>
<p>The member <code>code</code> of an answer with an error is one of these; its member
<code>type</code> leads here.</p>
<dl>
{_KINDS}
</dl>
<p><a href="../docs">The operations of the service</a></p>
</body>
</html>
"""


def check_files() -> None:
    """Raise if the files of the page are missing, as in a program that was frozen without them.

    Raises:
        InvalidSettings: With the argument that asked for the page.
    """
    for name in MEDIA_TYPES:
        if name != START_SCRIPT and _find(name) is None:
            reason = f"needs the file {name} of incidentkit.http, which this program does not have"
            raise InvalidSettings("docs", reason)


def page() -> Response:
    """Return the page."""
    return Response(_PAGE, headers=HEADERS, media_type="text/html")


def problems_page() -> Response:
    """Return the page that describes every kind of problem."""
    return Response(_PROBLEMS, headers=HEADERS, media_type="text/html")


def asset(name: str, known: str = "", accepted: str = "") -> Response:
    """Return a file of the page, or 304 if the browser has it.

    Args:
        name: The name of the file.
        known: The entity tags of the files that the browser has, as in ``If-None-Match``.
        accepted: The encodings that the browser takes, as in ``Accept-Encoding``.

    Raises:
        HTTPException: 404 if the page has no such file.
    """
    if name not in MEDIA_TYPES:
        raise HTTPException(404)
    content, tag, encoding = _file(name, compressed=_takes_gzip(accepted))
    headers = {**HEADERS, "Cache-Control": "no-cache", "ETag": tag, "Vary": "Accept-Encoding"}
    if tag in (given.strip().removeprefix("W/") for given in known.split(",")):
        return Response(status_code=304, headers=headers)
    if encoding is not None:
        headers["Content-Encoding"] = encoding
    return Response(content, headers=headers, media_type=MEDIA_TYPES[name])


def _takes_gzip(accepted: str) -> bool:
    """Return whether a value of ``Accept-Encoding`` allows gzip; an empty one does not."""
    found = filter(None, map(_ENCODING.fullmatch, accepted.lower().split(",")))
    weights = {match[1]: float(match[2] or 1) for match in found}
    return weights.get("gzip", weights.get("*", 0)) > 0


@cache
def _file(name: str, *, compressed: bool) -> tuple[bytes, str, str | None]:
    """Return the content of a file, its entity tag, and the encoding if it is compressed."""
    content, encoding = _START.encode(), None
    file = _find(name)
    if file is not None:
        content = file.read_bytes()
        if file.name.endswith(".gz"):
            content, encoding = (
                (content, "gzip") if compressed else (gzip.decompress(content), None)
            )
    return content, f'"{sha256(content).hexdigest()[:32]}"', encoding


def _find(name: str) -> Traversable | None:
    """Return the file in the folder, compressed or as it is; None if there is none."""
    found = (FOLDER / each for each in (f"{name}.gz", name))
    return next((file for file in found if file.is_file()), None)
