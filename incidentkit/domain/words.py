"""The words of a text: the one rule by which messages and searches are compared.

The rule is Unicode's NFKC_Casefold, by the table in ``characters.py``, and a way to find the words
of the outcome. Both databases hold the table and the rule, so that the words of a message depend
neither on the program that wrote it nor on a locale. A change needs another :data:`RULE`, and a
migration that indexes all messages again.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from functools import cache
from typing import Final, NamedTuple

from incidentkit.domain.characters import CHARACTERS, COMPOSED

RULE: Final = 1
"""The number of the rule, in the names of the functions on PostgreSQL."""

SEARCHED: Final = 5000
"""Number of characters that have words: more than those of any message that incidentkit stores."""

LONG: Final = 255
"""Number of characters from which on an index may know only the beginning of a word."""

_QUOTES: Final = str.maketrans(dict.fromkeys("“”„‟«»\N{FULLWIDTH QUOTATION MARK}", '"'))
"""Other quotation marks than the plain one."""

_ASCII: Final = {point: chr(point).lower() if chr(point).isalnum() else " " for point in range(128)}


class Rule(NamedTuple):
    """The rule for a range of characters.

    Attributes:
        first: The number of the first character. The range ends where the next one begins.
        folded: What stands for each of them before marks are composed; None: the character itself.
        separated: What stands for each of them in the end; None: the character itself.
        alone: Whether each of them is a word, which blanks separate in the end.
    """

    first: int
    folded: str | None = None
    separated: str | None = None
    alone: bool = False


@cache
def compositions() -> dict[str, tuple[str, str]]:
    """Return every composed character with its parts: a letter, maybe composed, and a mark."""
    points = ([chr(int(part, 16)) for part in each.split(":")] for each in COMPOSED.split())
    return {composed: (letter, mark) for composed, letter, mark in points}


@cache
def rules() -> tuple[Rule, ...]:
    """Return the rules for all characters, in their order."""
    entries = [_parse(entry) for entry in CHARACTERS.split()]
    firsts = [first for first, _, _ in entries]

    def separated(character: str) -> str:
        """Return what stands for a folded character in the end."""
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
    """Return the words of a text as they are compared, with a blank between each two.

    A word is a run of letters, marks and digits. Where a script has no blanks between words, each
    character is a word. Of a longer text, the first :data:`SEARCHED` characters count.
    """
    text = text[:SEARCHED]
    if text.isascii():
        return " ".join(text.translate(_ASCII).split())
    folding, separating = _tables()
    # This is the same in every version of Unicode: the table has its own assigned characters only.
    folded = unicodedata.normalize("NFC", text.translate(folding))
    return " ".join(folded.translate(separating).split())


class Phrase(NamedTuple):
    """Words of a search that a message must have, one directly after the other.

    Attributes:
        given: The text of the search.
        words: Its words as they are compared.
        begins: Whether its only word may also be the beginning of a longer one.
    """

    given: str
    words: str
    begins: bool = False

    @property
    def pattern(self) -> str:
        """The text that is a part of `` one two three `` for each message that has the phrase."""
        return f" {self.words}" if self.begins else f" {self.words} "


def phrases(text: str) -> list[Phrase]:
    """Return the phrases of a search, each once, without those that another one includes.

    A phrase is what stands between quotation marks or, elsewhere, between blanks. Only the last
    one can be the beginning of a word, if it is a single word and not quoted.
    """
    pieces = text.translate(_QUOTES).split('"')
    if len(pieces) % 2 == 0:
        # The last quotation mark has no partner.
        pieces[-2:] = ['"'.join(pieces[-2:])]
    given = [
        (each, number % 2 == 1)
        for number, piece in enumerate(pieces)
        for each in ([piece] if number % 2 else piece.split())
    ]
    found = [(each, compared(each), quoted) for each, quoted in given]
    found = [each for each in found if each[1]]
    every = [Phrase(each, words) for each, words, _ in found[:-1]]
    for each, words, quoted in found[-1:]:
        every.append(Phrase(each, words, begins=not quoted and " " not in words))
    distinct = {phrase.pattern: phrase for phrase in every}
    return [
        phrase
        for pattern, phrase in distinct.items()
        if not any(pattern in other for other in distinct if other is not pattern)
    ]
