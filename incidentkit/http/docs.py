"""Swagger UI, from the files of an installed package; the browser loads nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.resources.abc import Traversable
from typing import Final

from starlette.exceptions import HTTPException
from starlette.responses import Response

from incidentkit.domain.errors import MissingDependency

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
"""The files of the page; all but the start script are in the package."""

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

_START: Final = """\
"use strict";
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
"""


@cache
def assets_folder() -> Traversable:
    """Return the folder of Swagger UI's files, which may be in a zip file.

    Raises:
        MissingDependency: If their package is not installed, or lacks one of the files.
    """
    try:
        folder: Traversable = import_module("swagger_ui_bundle").swagger_ui_path
    except ModuleNotFoundError as error:
        if error.name != "swagger_ui_bundle":
            raise
        raise MissingDependency("swagger-ui-bundle-v2", extra="server") from error
    if not all((folder / name).is_file() for name in MEDIA_TYPES if name != START_SCRIPT):
        raise MissingDependency("swagger-ui-bundle-v2", extra="server")
    return folder


def page() -> Response:
    """Return the page."""
    return Response(_PAGE, headers=HEADERS, media_type="text/html")


def asset(name: str, known: str = "") -> Response:
    """Return a file of the page, or 304 if the browser has it.

    Args:
        name: The name of the file.
        known: The entity tags of the files that the browser has, as in ``If-None-Match``.

    Raises:
        HTTPException: 404 if the page has no such file.
    """
    if name not in MEDIA_TYPES:
        raise HTTPException(404)
    content, tag = _file(name)
    headers = {**HEADERS, "Cache-Control": "no-cache", "ETag": tag}
    if tag in (given.strip().removeprefix("W/") for given in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=MEDIA_TYPES[name])


@cache
def _file(name: str) -> tuple[bytes, str]:
    """Return the content of a file and its entity tag."""
    content = _START.encode() if name == START_SCRIPT else (assets_folder() / name).read_bytes()
    return content, f'"{sha256(content).hexdigest()[:32]}"'
