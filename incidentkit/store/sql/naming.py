"""Apply a schema to the tables, types and functions in SQL text.

The text names them without a schema. If a statement is compiled with a ``schema_translate_map``,
they get the schema that the map has for tables without one, as in SQLAlchemy's own statements.
"""

from __future__ import annotations

import re
from typing import Any, Final

from sqlalchemy import MetaData, Table, TextClause
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

from incidentkit.domain.words import RULE
from incidentkit.store.schema import VERSION_TABLE

TABLES: Final = (
    '"Incident"',
    "incident_event",
    "incident_purged_event",
    "incident_idempotency_key",
    "incident_token",
    "incident_access_token",
    "request_log",
    VERSION_TABLE,
)
"""The names of the tables as SQL has them."""

TYPES: Final = ("incidentstatus", "incidentsource")
"""The names of the types."""

RULE_FUNCTIONS: Final = tuple(f"incident_{name}_{RULE}" for name in ("characters", "text", "words"))
"""The names of the functions that hold the rule of words."""

WORDS_FUNCTION: Final = RULE_FUNCTIONS[-1]
"""The function of the index of words."""

FUNCTIONS: Final = ("incident_words", *RULE_FUNCTIONS)
"""The names of the functions that statements and indexes call."""

TRANSLATE_MAP: Final = "schema_translate_map"
"""SQLAlchemy's option that moves tables to another schema. A statement of incidentkit has it if the
client has a schema, or if the statement names no table."""

_NAME: Final = re.compile(
    rf"(?<![\w.:\"])(?:{'|'.join((*TABLES, *TYPES, *FUNCTIONS))})(?![\w\"])", re.ASCII
)
_any_table: Final = Table("t", MetaData())


class NamingText(TextClause):
    """SQL as text, with names that get a schema when the text is compiled with one."""

    inherit_cache = True


def text(sql: str) -> NamingText:
    """Return SQL as text; a name such as ``:name`` is a parameter, as in SQLAlchemy's ``text``."""
    return NamingText(sql)


def in_schema(sql: str, compiler: SQLCompiler) -> str:
    """Return SQL with the schema that a compiler has for tables without one, before each name."""
    if not compiler.schema_translate_map:
        return sql
    prefix = compiler.preparer.format_table(_any_table).removesuffix(_any_table.name)
    return _NAME.sub(lambda found: prefix + found[0], sql)


@compiles(NamingText)
def _naming_text(element: NamingText, compiler: SQLCompiler, **options: Any) -> str:
    visit: Any = compiler.visit_textclause
    return in_schema(visit(element, **options), compiler)
