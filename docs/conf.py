"""How Sphinx builds these pages: `nox -s docs`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from incidentkit import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project: Final = "incidentkit"
author: Final = "the incidentkit authors"
project_copyright: Final = f"2026, {author}"
version: Final = __version__
release: Final = __version__

extensions: Final = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns: Final = ["_build"]
myst_heading_anchors: Final = 3

autodoc_member_order: Final = "bysource"
autodoc_default_options: Final = {"members": True}
napoleon_google_docstring: Final = True
napoleon_numpy_docstring: Final = False
# Attributes as fields of their class: attrs declares them without docstrings of their own.
napoleon_use_ivar: Final = True
python_maximum_signature_line_length: Final = 80
python_use_unqualified_type_names: Final = True

html_theme: Final = "furo"
html_title: Final = f"{project} {version}"
html_copy_source: Final = False
html_show_sphinx: Final = False

# What other packages define; no inventory of theirs is fetched, so that a build needs no network.
nitpick_ignore_regex: Final = [
    ("py:class", r"(asyncio|asyncpg|collections|datetime|enum|os|redis|starlette)\..*"),
    ("py:class", "AsyncEngine|Callable.*|Pool|Record|Starlette|datetime"),
    ("py:mod", "contextvars"),
]

# Names that a module gives to types for its own use.
ALIASES: Final = {
    "Events": "list[IncidentEvent]",
    "Graph": "Mapping[str, Collection[str]]",
    "Incidents": "list[Incident]",
    "Place": "tuple[int, int]",
    "RequestLog": "Literal['log', 'database']",
    "RequestLogSetting": "Literal['log', 'database']",
}


def spell_out(*event: Any) -> tuple[str | None, str | None]:
    """Write out the aliases in a signature."""
    *_, arguments, returns = event
    alias = re.compile(rf"\b({'|'.join(ALIASES)})\b")

    def spelled(signature: str | None) -> str | None:
        return signature and alias.sub(lambda found: ALIASES[found[0]], signature)

    return spelled(arguments), spelled(returns)


def setup(app: Sphinx) -> None:
    """Listen to autodoc."""
    app.connect("autodoc-process-signature", spell_out)
