"""Swagger UI, from files of an installed package: it asks nothing of the internet."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Final

from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from incidentkit.errors import MissingDependency

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

MEDIA_TYPES: Final = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}
"""The files of the package that the page needs."""

START_SCRIPT: Final = "start.js"

# Every link is relative to the page, wherever it is mounted.
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
def assets_folder() -> Path:
    """Return the folder with the files of Swagger UI.

    Raises:
        MissingDependency: If the package that has them is not installed.
    """
    try:
        return Path(import_module("swagger_ui_bundle").swagger_ui_path)
    except ModuleNotFoundError as error:
        if error.name != "swagger_ui_bundle":
            raise
        raise MissingDependency("swagger-ui-bundle-v2", extra="server") from error


def page() -> Response:
    """Return the page."""
    return Response(_PAGE, headers=HEADERS, media_type="text/html")


def asset(name: str) -> Response:
    """Return a file of the page.

    Raises:
        HTTPException: 404 if the page has no such file.
    """
    if name == START_SCRIPT:
        return Response(_START, headers=HEADERS, media_type="text/javascript")
    if name not in MEDIA_TYPES:
        raise HTTPException(404)
    return FileResponse(assets_folder() / name, headers=HEADERS, media_type=MEDIA_TYPES[name])
