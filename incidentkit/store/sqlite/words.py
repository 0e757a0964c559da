"""The triggers that index the words of a message on SQLite, which a migration creates.

The triggers are plain SQL, since other programs that write do not have functions of incidentkit. A
message in ASCII is stored in the full-text table as it is, and its tokenizer does what the rule
says. Any other one is stored as the rule compares it, by the table ``incident_character``.

The full-text table has texts of its own. An index on the table of incidents has to be given the old
text of each message to remove its words, and ``INSERT OR REPLACE`` removes rows without a trigger.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from math import inf
from time import monotonic
from typing import Any, Final

from sqlalchemy import Connection

from incidentkit.domain.characters import MARKS
from incidentkit.domain.words import SEARCHED, compared, compositions, rules

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

    Its tokenizer takes every character beyond ASCII for one of a word.
    """
    return f"CREATE VIRTUAL TABLE {name} USING fts5(words, tokenize = 'ascii', columnsize = 0)"


def triggers(text_table: str = TEXT) -> dict[str, str]:
    """Return the definitions of the triggers that keep the words of each message, by name."""
    # Not REPLACE: the conflict clause of the statement that fires a trigger comes first.
    remove = f"DELETE FROM {text_table} WHERE rowid = {{}}.incident_id; "
    message = f"substr(new.incident_message, 1, {SEARCHED})"
    add = (
        f"INSERT INTO {text_table} (rowid, words) VALUES (new.incident_id, "
        f"CASE WHEN new.incident_message GLOB {OTHER_THAN_ASCII} "
        f"THEN {words(message)} ELSE {message} END); "
    )
    before, after = remove.format("old"), remove.format("new") + add
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
        seconds: When to stop.

    Returns:
        The id after which to go on; None: every message is indexed.
    """
    select = (
        'SELECT incident_id, incident_message FROM "Incident" WHERE incident_id > ? '
        f"AND NOT EXISTS (SELECT 1 FROM {text_table}_content WHERE id = incident_id) "
        f"ORDER BY incident_id LIMIT {BATCH}"
    )
    insert = f"INSERT INTO {text_table} (rowid, words) VALUES (?, ?)"
    end = monotonic() + seconds
    while rows := connection.exec_driver_sql(select, (after,)).all():
        words = [(incident_id, compared(message)) for incident_id, message in rows]
        connection.exec_driver_sql(insert, words)
        after = rows[-1][0]
        if monotonic() > end:
            return after
    return None


def characters() -> Iterator[tuple[Any, ...]]:
    """Yield the rows of the table of characters.

    A row holds for the characters from ``first`` to that of the next row:

    - ``folded``: what stands for each before marks are composed; null: the character itself
    - ``separated``: what stands for each in the end; null: the character itself; ``*``: the same
      between blanks
    - ``class``: its combining class
    - ``composes``: whether it could be composed with the character before it
    - ``parts``: the letter and the mark of a composed character

    Another row for each composed character has the number of its letter times 2^21, plus that of
    its mark, as ``first``.
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


def literal(text: str) -> str:
    """Return a text as a literal."""
    return "'" + text.replace("'", "''") + "'"


OTHER_THAN_ASCII: Final = literal("*[^ -~\t\n\r]*")

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
        SELECT {message}, ltrim({message}, {literal(PLAIN)}), '', '', 0
        UNION ALL
        SELECT
            substr(rest, 2),
            ltrim(substr(rest, 2), {literal(PLAIN)}),
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
