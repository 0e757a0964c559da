"""Define the triggers that index the words of a message on SQLite; a migration creates them.

The triggers are plain SQL, since other programs do not have functions of incidentkit. A message in
ASCII is stored in the full-text table as it is, and the tokenizer applies the rule. Any other
message is stored as the rule compares it, by the table ``incident_character``.

The full-text table keeps its own copy of each text. An external-content table would need the old
text to remove its words, and ``INSERT OR REPLACE`` removes rows without firing a trigger.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic
from typing import Any, Final

from sqlalchemy import Connection

from incidentkit.domain.characters import MARKS
from incidentkit.domain.words import SEARCHED, compared, compositions, rules
from incidentkit.store.sql.triggers import quoted

CHARACTERS: Final = "incident_character"
"""The table of characters."""

CREATE_CHARACTERS: Final = f"""CREATE TABLE {CHARACTERS} (
    first INTEGER NOT NULL PRIMARY KEY,
    folded TEXT,
    separated TEXT,
    class INTEGER NOT NULL,
    composes INTEGER NOT NULL,
    parts TEXT
)"""

TEXT: Final = "incident_text"
"""The full-text table."""

CHANGED: Final = "incident_id, rowid, oid, _rowid_, incident_message"
"""The columns whose change replaces the words of a row. The id has four names, of which SQLite
compares the one in the statement."""

BATCH: Final = 1000
"""Number of messages that are indexed at a time."""

HANGUL_VOWELS: Final = range(0x1161, 0x1176)
HANGUL_FINALS: Final = range(0x11A8, 0x11C3)

# ltrim() compares with one character after the other: the frequent ones come first.
PLAIN: Final = (
    " оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё etaoinsrhldcumfpgwybvkxjqz0123456789äöüéèàáíóñç"
    + "".join(
        each for each in map(chr, range(33, 127)) if not each.islower() and not each.isdigit()
    )
    + "\t\n\r"
)
"""Characters that the full-text table takes as they are."""


def create_text(name: str) -> str:
    """Return the definition of a full-text table.

    Its tokenizer treats every character beyond ASCII as part of a word.
    """
    return f"CREATE VIRTUAL TABLE {name} USING fts5(words, tokenize = 'ascii', columnsize = 0)"


def triggers(*text_tables: str) -> dict[str, str]:
    """Return the definitions of the triggers that keep the words of each message, by name.

    Args:
        text_tables: The full-text tables; by default the one of the schema.
    """
    # Not REPLACE: the conflict clause of the statement that fires a trigger comes first.
    remove = "DELETE FROM {} WHERE rowid = {}.incident_id; "
    message = f"substr(new.incident_message, 1, {SEARCHED})"
    add = (
        "INSERT INTO {} (rowid, words) VALUES (new.incident_id, "
        f"CASE WHEN new.incident_message GLOB {OTHER_THAN_ASCII} "
        f"THEN {words(message)} ELSE {message} END); "
    ).replace
    before = after = ""
    for name in text_tables or (TEXT,):
        before += remove.format(name, "old")
        after += remove.format(name, "new") + add("{}", name)
    return {
        f"incident_text_{name}": (
            f'CREATE TRIGGER incident_text_{name} AFTER {event} ON "Incident" BEGIN {actions}END'
        )
        for name, event, actions in (
            ("insert", "INSERT", after),
            ("update", f"UPDATE OF {CHANGED}", before + after),
            ("delete", "DELETE", before),
        )
    }


def index_messages(
    connection: Connection, text_table: str = TEXT, *, after: int = 0, seconds: float = inf
) -> int | None:
    """Index the messages that a full-text table lacks, in the order in which it grows fastest.

    Args:
        connection: In a transaction.
        text_table: The full-text table.
        after: The id after which to begin.
        seconds: Time after which to stop.

    Returns:
        The id after which to continue; None: every message is indexed.
    """
    select = (
        'SELECT incident_id, incident_message FROM "Incident" WHERE incident_id > ? '
        f"AND NOT EXISTS (SELECT 1 FROM {text_table}_content WHERE id = incident_id) "
        f"ORDER BY incident_id LIMIT {BATCH}"
    )
    insert = f"INSERT INTO {text_table} (rowid, words) VALUES (?, ?)"
    end = monotonic() + seconds
    with _as_stored(connection):
        while rows := connection.exec_driver_sql(select, (after,)).all():
            words = [(incident_id, compared(_readable(stored))) for incident_id, stored in rows]
            connection.exec_driver_sql(insert, words)
            after = rows[-1][0]
            if monotonic() > end:
                return after
    return None


@contextmanager
def _as_stored(connection: Connection) -> Iterator[None]:
    """Read texts as bytes: other programs may have stored what is not UTF-8."""
    driver_connection: Any = connection.connection.driver_connection
    factory = driver_connection.text_factory
    driver_connection.text_factory = bytes
    try:
        yield
    finally:
        driver_connection.text_factory = factory


def _readable(stored: bytes) -> str:
    """Return the text of a message as the triggers see it: up to a NUL character.

    What is not UTF-8 separates words.
    """
    return stored.partition(b"\0")[0].decode(errors="replace")


def characters() -> Iterator[tuple[Any, ...]]:
    """Yield the rows of the table of characters.

    A row holds for the characters from ``first`` to that of the next row:

    - ``folded``: its replacement before marks are composed; null: the character itself
    - ``separated``: its replacement in the result; null: the character itself; ``*``: the character
      between blanks
    - ``class``: its combining class
    - ``composes``: whether it could be composed with the character before it
    - ``parts``: the letter and the mark of a composed character

    Another row for each composed character has as ``first`` the code point of its letter times
    2^21, plus that of its mark.
    """
    classes: dict[int, int] = {}
    for entry in MARKS.split():
        first, of, number = entry.split(":")
        classes.update(dict.fromkeys(range(start := int(first, 16), start + int(number)), int(of)))
    parts = {ord(composed): pair for composed, pair in compositions().items()}
    seconds = {*classes, *HANGUL_VOWELS, *HANGUL_FINALS, *(ord(mark) for _, mark in parts.values())}
    table = rules()
    firsts = [rule.first for rule in table]
    bounds = {bound for point in (*seconds, *parts) for bound in (point, point + 1)}
    for point in sorted(bounds.union(firsts)):
        rule = table[bisect_right(firsts, point) - 1]
        yield (
            point,
            rule.folded,
            "*" if rule.alone else rule.separated,
            classes.get(point, 0),
            any(each in seconds for each in (point, *map(ord, rule.folded or ""))),
            "".join(parts[point]) if point in parts else None,
        )
    for composed, (letter, mark) in parts.items():
        yield ord(letter) * 2**21 + ord(mark), chr(composed), None, 0, False, None


OTHER_THAN_ASCII: Final = quoted("*[^ -~\t\n\r]*")

RULE_OF_NEXT: Final = (
    f"rule.first = (SELECT max(first) FROM {CHARACTERS} WHERE first <= unicode(rest))"
)

SEPARATED: Final = """CASE rule.separated
                WHEN '*' THEN ' ' || substr(rest, 1, 1) || ' '
                ELSE coalesce(rule.separated, substr(rest, 1, 1))
            END"""

# A leading consonant and a vowel of Hangul, or a syllable of these two and a final consonant.
OPEN_SYLLABLE: Final = "rest GLOB '[\u1100-\u1112][\u1161-\u1175]*'"
CLOSED_SYLLABLE: Final = """
                    unicode(rest) BETWEEN 44032 AND 55203
                    AND unicode(rest) % 28 = 16
                    AND coalesce(unicode(substr(rest, 2)), 0) BETWEEN 4520 AND 4546"""


def words(message: str) -> str:
    """Return the expression for the words of a message, by the rule in ``domain/words.py``.

    SQLite has no normal forms: a text with marks is composed here, as Unicode describes it.

    - ``mapped`` folds one character after the other, and takes runs of plain ones as they are.
    - ``piece`` takes composed characters apart, so that ``ordered`` can sort marks by their class.
    - ``composed`` joins a letter with each mark that no other one separates from it.
    - ``parted`` separates the words.
    """
    return f"""(
    WITH RECURSIVE
    mapped (plain, rest, folded, separated, composes) AS (
        SELECT {message}, ltrim({message}, {quoted(PLAIN)}), '', '', 0
        UNION ALL
        SELECT
            substr(rest, 2),
            ltrim(substr(rest, 2), {quoted(PLAIN)}),
            mapped.folded || substr(plain, 1, length(plain) - length(rest))
                || coalesce(rule.folded, substr(rest, 1, 1)),
            mapped.separated || substr(plain, 1, length(plain) - length(rest)) || {SEPARATED},
            mapped.composes OR rule.composes
        FROM mapped
        JOIN {CHARACTERS} AS rule ON {RULE_OF_NEXT}
        WHERE rest <> ''
    ),
    piece (rest, number, character, class) AS (
        SELECT folded || plain, 0, NULL, NULL
        FROM mapped
        WHERE rest = ''
        UNION ALL
        SELECT
            CASE
                WHEN {OPEN_SYLLABLE} THEN char(
                    44032 + (unicode(rest) - 4352) * 588 + (unicode(substr(rest, 2)) - 4449) * 28
                ) || substr(rest, 3)
                WHEN {CLOSED_SYLLABLE}
                THEN char(unicode(rest) + unicode(substr(rest, 2)) - 4519) || substr(rest, 3)
                ELSE coalesce(rule.parts, rule.folded, '') || substr(rest, 2)
            END,
            number + 1,
            CASE
                WHEN coalesce(rule.parts, rule.folded) IS NULL
                    AND NOT {OPEN_SYLLABLE}
                    AND NOT ({CLOSED_SYLLABLE})
                THEN substr(rest, 1, 1)
            END,
            rule.class
        FROM piece
        JOIN {CHARACTERS} AS rule ON {RULE_OF_NEXT}
        WHERE rest <> ''
    ),
    ordered (rest) AS (
        SELECT group_concat(character, '') OVER (ORDER BY run, class, number)
        FROM (
            SELECT *, sum(class = 0) OVER (ORDER BY number) AS run
            FROM piece
            WHERE character IS NOT NULL
        )
    ),
    composed (rest, done, letter, marks, class) AS (
        SELECT *
        FROM (SELECT rest, '', '', '', 0 FROM ordered ORDER BY length(rest) DESC LIMIT 1)
        UNION ALL
        SELECT
            substr(rest, 2),
            CASE
                WHEN pair.first IS NULL AND rule.class = 0 THEN done || letter || marks
                ELSE done
            END,
            coalesce(pair.folded, CASE rule.class WHEN 0 THEN substr(rest, 1, 1) ELSE letter END),
            CASE
                WHEN pair.first IS NOT NULL THEN marks
                WHEN rule.class = 0 THEN ''
                ELSE marks || substr(rest, 1, 1)
            END,
            CASE WHEN pair.first IS NOT NULL THEN composed.class ELSE rule.class END
        FROM composed
        JOIN {CHARACTERS} AS rule ON {RULE_OF_NEXT}
        LEFT JOIN {CHARACTERS} AS pair
            ON pair.first = unicode(letter) * 2097152 + unicode(rest)
            AND (marks = '' OR composed.class < rule.class)
        WHERE rest <> ''
    ),
    parted (rest, separated) AS (
        SELECT done || letter || marks, ''
        FROM composed
        WHERE rest = ''
        UNION ALL
        SELECT substr(rest, 2), parted.separated || {SEPARATED}
        FROM parted
        JOIN {CHARACTERS} AS rule ON {RULE_OF_NEXT}
        WHERE rest <> ''
    )
    SELECT CASE
        WHEN composes THEN (SELECT separated FROM parted WHERE rest = '')
        ELSE separated || plain
    END
    FROM mapped
    WHERE rest = ''
)"""
