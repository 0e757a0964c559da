"""Swagger UI in a browser, with access tokens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx2

from incidentkit import IncidentClient
from tests.browser.conftest import until

if TYPE_CHECKING:
    from tests.browser.conftest import Browser, Service

GET = "#operations-incident-list_incidents"
CODE = f"{GET} .live-responses-table .response .response-col_status"

CLICK = """
const element = document.querySelector(arguments[0]);
if (element !== null) element.click();
return element !== null;
"""

TYPE = """
const element = document.querySelector(arguments[0]);
if (element === null) return false;
const set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set;
set.call(element, arguments[1]);
element.dispatchEvent(new Event("input", {bubbles: true}));
return true;
"""

TEXT = "return document.querySelector(arguments[0])?.textContent ?? '';"


async def create_token(url: str) -> str:
    """Create a token that may read, and return its secret."""
    async with IncidentClient.open(url) as incidents:
        return (await incidents.tokens.create("reader", "read")).secret


def test_swagger_ui_sends_a_token(browser: Browser, service: Service) -> None:
    """The button Authorize takes a token, and requests are answered with it alone."""
    secret = asyncio.run(create_token(service.postgres.url))
    until(lambda: httpx2.get(f"{service.url}/incident/get").status_code == 401)

    def does(script: str, *arguments: Any) -> None:
        until(lambda: browser.run(script, *arguments))

    browser.go(f"{service.url}/docs")
    does(CLICK, f"{GET} .opblock-summary-control")
    does(CLICK, f"{GET} .try-out__btn")
    does(CLICK, f"{GET} .execute")
    until(lambda: browser.run(TEXT, CODE).startswith("401"))
    does(CLICK, ".auth-wrapper .authorize")
    does(TYPE, ".auth-container input", secret)
    does(CLICK, ".auth-container .authorize")
    does(CLICK, ".modal-ux .close-modal")
    does(CLICK, f"{GET} .execute")
    until(lambda: browser.run(TEXT, CODE).startswith("200"))
