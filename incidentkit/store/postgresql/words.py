"""Define the functions that find the words of a message on PostgreSQL; a migration creates them.

The table of characters stands in a function, not in a table: an index must not depend on rows that
can change, or that are missing while a dump is restored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from incidentkit.domain.words import LONG, RULE, SEARCHED, compared, rules

MAX_BYTES: Final = 2046
"""Maximum number of bytes of a word in a ``tsvector``."""

ALONE: Final = "*"
"""Marks a character in the table that is a word of its own."""

# translate() compares with one character after the other: the frequent ones come first.
LATIN: Final = " etaoinsrhldcumfpgwybvkxjqz0123456789"
CYRILLIC: Final = " оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё"
ASCII: Final = (
    *LATIN,
    *(each for each in map(chr, range(1, 128)) if not each.isalnum() and each != " "),
    *LATIN[1:27].upper(),
)
PUNCTUATION: Final = tuple(map(chr, (*range(0xA0, 0xC0), *range(0x2010, 0x2030))))
WESTERN: Final = (*ASCII, *map(chr, range(0xC0, 0x180)), *PUNCTUATION)
EASTERN: Final = tuple(
    dict.fromkeys(
        (*CYRILLIC, *ASCII, *CYRILLIC[1:].upper(), *map(chr, range(0x400, 0x460)), *PUNCTUATION)
    )
)
"""The usual characters of European languages, by the alphabet."""


def functions(schema: str, encoding: str) -> Iterator[str]:
    """Yield the definitions of the functions.

    ``incident_text`` returns the words of a message as they are compared, with a blank before and
    after each, and ``incident_words`` returns them for the index. The planner inlines both. For
    characters beyond ASCII they call ``incident_characters``. PostgreSQL resolves this reference
    when it creates them, so it needs no search path and follows a renamed schema.
    """
    ascii_only = (
        "octet_length(message) = length(message)"
        if encoding == "UTF8"
        else r"""message COLLATE "C" ~ '^[\x01-\x7f]*$'"""
    )
    characters = f"{schema}.incident_characters_{RULE}"
    words = any_characters() if encoding == "UTF8" else characters_by_locale(encoding)
    yield function(characters, "text", words)
    yield function(
        f"{schema}.incident_text_{RULE}",
        "text",
        f"""
        RETURN CASE
            WHEN {ascii_only} AND octet_length(message) <= {SEARCHED}
            THEN {one_blank(translated(ASCII))}
            ELSE {characters}(message)
        END""",
    )
    yield function(
        f"{schema}.incident_words_{RULE}",
        "tsvector",
        f"""
        RETURN CASE
            WHEN {ascii_only} AND octet_length(message) <= {MAX_BYTES}
            THEN CAST({translated(ASCII)} AS tsvector)
            ELSE CAST(
                regexp_replace(
                    {characters}(message), '([^ ]{{{LONG}}})[^ ]+', '\\1', 'g'
                ) AS tsvector
            )
        END""",
    )


def function(name: str, returns: str, body: str) -> str:
    """Return the definition of a function of a message."""
    # Not STRICT: the planner would not inline the function.
    return (
        f"CREATE OR REPLACE FUNCTION {name}(message text) RETURNS {returns} "
        f"IMMUTABLE PARALLEL SAFE {body}"
    )


def translated(characters: tuple[str, ...]) -> str:
    """Return the expression for the words of a message that has only these characters."""
    found = [(each, becomes(each)) for each in characters]
    pairs = [(each, words) for each, words in found if words is not None]
    from_ = literal("".join(each for each, _ in pairs))
    return f"translate(message, {from_}, {literal(''.join(words for _, words in pairs))})"


def becomes(character: str) -> str | None:
    """Return the single character that always replaces a character; None: there is none."""
    words = compared(f"x{character}x")[1:-1]
    return words if len(words) == 1 else None


def known(characters: tuple[str, ...]) -> str:
    """Return the characters that :func:`translated` knows, for a regular expression."""
    return escaped("".join(each for each in characters if becomes(each)))


def literal(text: str) -> str:
    """Return a text as a literal in ASCII."""
    return f"E'{escaped(text)}'"


def escaped(text: str) -> str:
    """Return a text as escapes of a string, or of a regular expression."""
    return "".join(
        each if each.isalnum() and each < "\x80" else f"\\u{ord(each):04x}" for each in text
    )


def one_blank(words: str) -> str:
    """Return the expression for words with one blank before and after each."""
    apart = f"replace(' ' || {words} || ' ', ' ', E' \\x01')"
    return f"replace(replace({apart}, E'\\x01 ', ''), E'\\x01', '')"


def any_characters() -> str:
    """Return the body of the function for all characters, in the encoding UTF8."""
    table = rules()
    firsts = ",".join(str(rule.first) for rule in table)
    folded = json.dumps([rule.folded for rule in table], separators=(",", ":"))
    separated = json.dumps(
        [ALONE if rule.alone else rule.separated for rule in table], separators=(",", ":")
    )
    usual = "".join(
        f"""
            IF message COLLATE "C" ~ '^[{known(characters)}]*$' THEN
                RETURN {one_blank(translated(characters))};
            END IF;"""
        for characters in (WESTERN, EASTERN)
    )
    return f"""
        LANGUAGE plpgsql STRICT SET search_path = pg_catalog, pg_temp AS $$
        DECLARE
            folded text;
            separated text;
            composed text;
        BEGIN
            message := "left"(message, {SEARCHED});{usual}
            LOOP
                SELECT
                    string_agg(coalesce('{folded}'::jsonb ->> rule, character), ''),
                    string_agg(
                        CASE '{separated}'::jsonb ->> rule
                            WHEN '{ALONE}' THEN ' ' || character || ' '
                            ELSE coalesce('{separated}'::jsonb ->> rule, character)
                        END,
                        ''
                    )
                INTO folded, separated
                FROM (
                    SELECT
                        character,
                        width_bucket(ascii(character), '{{{firsts}}}'::integer[]) - 1 AS rule
                    FROM unnest(string_to_array(message, NULL)) AS character
                ) AS characters;
                -- The same on every server: what a newer Unicode assigns is a blank by now.
                composed := normalize(folded, NFC);
                EXIT WHEN composed = folded;
                message := composed;
            END LOOP;
            RETURN {one_blank("separated")};
        END $$"""


def characters_by_locale(encoding: str) -> str:
    """Return the body of the same function for another encoding, by the database's locale.

    Where characters have several bytes, each of them is a word: most are those of languages without
    blanks between words.
    """
    # In a Turkish locale, the lower case of I is not i.
    lower = f"lower(translate(message, '{LATIN[1:27].upper()}', '{LATIN[1:27]}'))"
    words = f"regexp_replace({lower}, '[^[:alnum:]]+', ' ', 'g')"
    if encoding.startswith(("EUC", "MULE")):
        words = f"regexp_replace({words}, '([^\\x01-\\x7f])', ' \\1 ', 'g')"
    return f"""
        LANGUAGE plpgsql STRICT SET search_path = pg_catalog, pg_temp AS $$
        BEGIN
            message := "left"(message, {SEARCHED});
            RETURN {one_blank(words)};
        END $$"""
