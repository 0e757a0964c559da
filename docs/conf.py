"""Configure Sphinx for these pages; `nox -s docs` builds them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, get_overloads

from sphinx.pycode import ModuleAnalyzer

from incidentkit import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project: Final = "incidentkit"
author: Final = "the incidentkit authors"
project_copyright: Final = f"2026, {author}"
version: Final = __version__
release: Final = __version__

extensions: Final = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
]
exclude_patterns: Final = ["_build"]
myst_enable_extensions: Final = ["attrs_inline", "colon_fence"]
myst_heading_anchors: Final = 3

autodoc_member_order: Final = "bysource"
autodoc_default_options: Final = {"members": True}
napoleon_google_docstring: Final = True
napoleon_numpy_docstring: Final = False
# Document attributes as fields of their class: attrs declares them without docstrings.
napoleon_use_ivar: Final = True
python_maximum_signature_line_length: Final = 80
python_use_unqualified_type_names: Final = True

html_theme: Final = "furo"
html_title: Final = f"{project} {version}"
html_copy_source: Final = False
html_show_sphinx: Final = False

# Names that other packages define. The build fetches no inventories, so it needs no network.
nitpick_ignore_regex: Final = [
    (
        "py:class",
        r"(asyncio|asyncpg|collections|contextlib|datetime|enum|fastapi)\..*",
    ),
    ("py:class", r"(os|pathlib|re|redis|starlette)\..*"),
    ("py:class", r"Async(BaseTransport|Connection|Engine|Session)|Connection|Pool|Record"),
    ("py:class", r"Callable.*|ContextVar|MeterProvider|PoolConnectionProxy|SSLContext|Starlette"),
    ("py:class", r"TracerProvider|datetime"),
    ("py:mod", "contextvars"),
]

# Private type aliases, and what a reader should see instead.
ALIASES: Final = {
    "EventList": "list[IncidentEvent]",
    "Graph": "Mapping[str, Collection[str]]",
    "IncidentList": "list[Incident]",
    "Joinable": "object",
    "OptionalIncidents": "list[Incident | None]",
    "OrderName": "Literal['newest', 'oldest']",
    "Place": "tuple[int, int]",
    "RequestLog": "Literal['log', 'database']",
    "RequestLogSetting": "Literal['log', 'database']",
    "SourceName": "Literal['operator', 'monitoring', 'partner']",
    "StatusName": "Literal['new', 'completed', 'failed']",
    "TimesName": "Literal['wire', 'rfc3339']",
}


def spell_out(*event: Any) -> tuple[str | None, str | None]:
    """Replace private aliases in a signature by the types they stand for."""
    *_, arguments, returns = event
    alias = re.compile(rf"\b({'|'.join(ALIASES)})\b")

    def spelled(signature: str | None) -> str | None:
        return signature and alias.sub(lambda found: ALIASES[found[0]], signature)

    return spelled(arguments), spelled(returns)


def show_overloads(_: Sphinx, what: str, name: str, documented: Any, *__: Any) -> None:
    """Let autodoc find the overloads of an inherited method.

    It looks them up under the class on the page, but the source has them under the base class.
    """
    if what == "method" and get_overloads(documented):
        analyzer = ModuleAnalyzer.for_module(documented.__module__)
        analyzer.analyze()
        on_the_page = ".".join(name.split(".")[-2:])
        analyzer.overloads.setdefault(on_the_page, analyzer.overloads[documented.__qualname__])


def setup(app: Sphinx) -> None:
    """Register the hooks with autodoc."""
    app.connect("autodoc-process-signature", show_overloads)
    app.connect("autodoc-process-signature", spell_out)
