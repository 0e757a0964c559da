"""Split messages and searches into words, by one rule.

The rule folds a text by Unicode's NFKC_Casefold, with the table in ``characters.py``, and splits
the result into words. Both databases hold the rule and its table, so the words of a message depend
neither on the program that wrote it nor on a locale. A change of the rule needs another
:data:`RULE`, and a migration that indexes all messages again.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from functools import cache
from typing import Final, NamedTuple

from incidentkit.domain.characters import CHARACTERS, COMPOSED

RULE: Final = 1
"""The number of the rule. The names of the functions on PostgreSQL end with it."""

SEARCHED: Final = 5000
"""Number of characters of a text that are searched. incidentkit stores no longer message."""

LONG: Final = 255
"""Length of a word, in characters, from which an index may hold only its beginning."""

_QUOTES: Final = str.maketrans(dict.fromkeys("“”„‟«»\N{FULLWIDTH QUOTATION MARK}", '"'))
"""Replaces other quotation marks by the plain one."""

_ASCII: Final = {point: chr(point).lower() if chr(point).isalnum() else " " for point in range(128)}


class Rule(NamedTuple):
    """The rule for a range of characters.

    Attributes:
        first: The code point of the first character. The range ends where the next one begins.
        folded: The replacement of each character, before marks are composed; None: the character
            itself.
        separated: The replacement of each character in the result; None: the character itself.
        alone: Whether each character is a word of its own, with a blank before and after it.
    """

    first: int
    folded: str | None = None
    separated: str | None = None
    alone: bool = False


@cache
def compositions() -> dict[str, tuple[str, str]]:
    """Return every composed character with its letter, maybe a composed one, and its mark."""
    points = ([chr(int(part, 16)) for part in each.split(":")] for each in COMPOSED.split())
    return {composed: (letter, mark) for composed, letter, mark in points}


@cache
def rules() -> tuple[Rule, ...]:
    """Return the rules for all characters, in the order of their code points."""
    entries = [_parse(entry) for entry in CHARACTERS.split()]
    firsts = [first for first, _, _ in entries]

    def separated(character: str) -> str:
        """Return the replacement of a folded character in the result."""
        _, kind, text = entries[bisect_right(firsts, ord(character)) - 1]
        return {".": character, "!": f" {character} ", "~": text}.get(kind, " ")

    found = []
    for first, kind, text in entries:
        match kind:
            case "=":
                found.append(Rule(first, text, "".join(map(separated, text))))
            case "~":
                found.append(Rule(first, separated=text))
            case "_":
                found.append(Rule(first, separated=" "))
            case "-":
                found.append(Rule(first, " ", " "))
            case _:
                found.append(Rule(first, alone=kind == "!"))
    return tuple(found)


def _parse(entry: str) -> tuple[int, str, str]:
    """Return the first character, the kind and the text of an entry."""
    first, *text = entry.split("+")
    return int(first[:-1], 16), first[-1], "".join(chr(int(each, 16)) for each in text)


class _Table(dict[int, str]):
    """A table for :meth:`str.translate`, which looks up each character once."""

    def __init__(self, *, separates: bool) -> None:
        self._rules = rules()
        self._firsts = [rule.first for rule in self._rules]
        self._separates = separates

    def __missing__(self, point: int) -> str:
        rule = self._rules[bisect_right(self._firsts, point) - 1]
        text = rule.separated if self._separates else rule.folded
        if text is None:
            text = f" {chr(point)} " if rule.alone and self._separates else chr(point)
        self[point] = text
        return text


@cache
def _tables() -> tuple[_Table, _Table]:
    return _Table(separates=False), _Table(separates=True)


def compared(text: str) -> str:
    """Return the words of a text as they are compared, separated by single blanks.

    A word is a run of letters, marks and digits. In a script without blanks between words, each
    character is a word. Only the first :data:`SEARCHED` characters of a text count.
    """
    text = text[:SEARCHED]
    if text.isascii():
        return " ".join(text.translate(_ASCII).split())
    folding, separating = _tables()
    # The same in every version of Unicode: the table has replaced unassigned characters.
    folded = unicodedata.normalize("NFC", text.translate(folding))
    return " ".join(folded.translate(separating).split())


class Phrase(NamedTuple):
    """Words of a search that a message must contain, one directly after the other.

    Attributes:
        given: The phrase as it was given.
        words: Its words as they are compared.
        begins: Whether its only word may also be the beginning of a longer one.
    """

    given: str
    words: str
    begins: bool = False

    @property
    def pattern(self) -> str:
        """The substring to find in the words of a message, with a blank before and after each."""
        return f" {self.words}" if self.begins else f" {self.words} "


def phrases(text: str) -> list[Phrase]:
    """Return the distinct phrases of a search, without those that another one includes.

    A phrase is a text between quotation marks or, outside of them, between blanks. The last phrase
    also matches the beginning of a word, if it is a single word without quotation marks.
    """
    pieces = text.translate(_QUOTES).split('"')
    if len(pieces) % 2 == 0:
        # The last quotation mark has no partner.
        pieces[-2:] = ['"'.join(pieces[-2:])]
    found: list[Phrase] = []
    begins = False
    for number, piece in enumerate(pieces):
        quoted = number % 2 == 1
        for given in [piece] if quoted else piece.split():
            words = compared(given)
            if words:
                found.append(Phrase(given, words))
                begins = not quoted and " " not in words
    if begins:
        found[-1] = found[-1]._replace(begins=True)
    distinct = {phrase.pattern: phrase for phrase in found}
    return [
        phrase
        for pattern, phrase in distinct.items()
        if not any(pattern in other for other in distinct if other is not pattern)
    ]
