"""The values that a shell offers for an option or an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

import click

Completion: TypeAlias = Callable[[click.Context, click.Parameter, str], list[str]]

SQLITE: Final = "sqlite+aiosqlite:///"
SUFFIXES: Final = (".db", ".sqlite", ".sqlite3")
"""The suffixes of SQLite files."""


def offering(values: Iterable[str]) -> Completion:
    """Return a completion that offers the values which begin with the typed text."""
    offered = [*values]

    def complete(_: click.Context, __: click.Parameter, typed: str) -> list[str]:
        return [value for value in offered if value.startswith(typed)]

    return complete


def offer_databases(_: click.Context, __: click.Parameter, typed: str) -> list[str]:
    """Offer the URLs of SQLite files and of folders, and the beginning of PostgreSQL's."""
    folder, slash, _name = typed.removeprefix(SQLITE).rpartition("/")
    files = _files(folder + slash) if typed.startswith(SQLITE) else _files("")
    urls = ["postgresql://", *(f"{SQLITE}{file}" for file in files)]
    return [url for url in urls if url.startswith(typed)]


def _files(folder: str) -> Iterator[str]:
    with suppress(OSError):
        for path in sorted(Path(folder).iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                yield f"{folder}{path.name}/"
            elif path.suffix in SUFFIXES:
                yield f"{folder}{path.name}"
