"""Write ``incidentkit/domain/characters.py`` from the Unicode database of this Python.

The table decides which texts a search finds, and both databases hold it. It is therefore made once,
from the Unicode version of the oldest supported Python, and shipped. A table of another version is
a new rule: it needs another number, and a migration that indexes all messages again.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Final

UNICODE: Final = "14.0.0"

TARGET: Final = Path(__file__).parents[1] / "incidentkit" / "domain" / "characters.py"

POINTS: Final = range(0x110000)
WORD: Final = "LMN"
"""The general categories of the characters of words: letters, marks and numbers."""

IOTA: Final = "\u0345"
"""A mark that folds to a letter. It has to stay a mark until marks are in order."""

LETTER: Final = "\N{GREEK SMALL LETTER IOTA}"

TANGUT: Final = range(0x17000, 0x18D09)
"""Ideographs for which Python 3.11 has no names."""

IGNORABLE: Final = frozenset(
    point
    for first, last in (
        *((0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5)),
        *((0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F)),
        *((0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0)),
        *((0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
    )
    for point in range(first, last + 1)
)
"""The property Default_Ignorable_Code_Point, which Python does not have."""

WITHOUT_BLANKS: Final = (
    *("CJK UNIFIED IDEOGRAPH", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HENTAIGANA", "BOPOMOFO"),
    *("YI SYLLABLE", "TANGUT", "NUSHU", "KHITAN", "THAI", "LAO", "KHMER", "MYANMAR"),
    *("TAI LE", "NEW TAI LUE", "TAI THAM", "TAI VIET", "AHOM"),
)
"""How the names of characters begin whose scripts have no blanks between words."""

IDEOGRAPHS: Final = (range(0x20000, 0x2FFFE), range(0x30000, 0x3FFFE))
"""The planes that Unicode keeps for ideographs, the unassigned ones included."""

HEADER: Final = '''"""The characters of words, and what each is compared as, by Unicode {version}.

``scripts/make_characters.py`` writes this module. Do not edit it: the databases hold its table.
"""

from __future__ import annotations

from typing import Final

UNICODE: Final = "{version}"
"""The version of Unicode that the table is made from. A character that it does not assign separates
words."""
'''

CHARACTERS_DOC: Final = '''
"""The ranges of characters, each as its first one in hexadecimal and a rule, up to the next range:

- ``.``: a character of words
- ``!``: a word of its own
- ``_``: separates words
- ``-``: separates words, and has no meaning to any normal form
- ``=`` and characters, as ``+`` and a hexadecimal number each: compared as these
- ``~`` and characters: compared as these, but only after marks are in their canonical order
"""
'''

MARKS_DOC: Final = '''
"""The combining classes of marks, in ranges: the first mark, the class in decimal, the number of
marks."""
'''

COMPOSED_DOC: Final = '''
"""The characters that a letter and a mark compose: the character, the letter, the mark. The letter
can be a composed one itself."""
'''


@cache
def is_word(point: int) -> bool:
    """Return whether a character can be part of a word."""
    return unicodedata.category(chr(point))[0] in WORD


@cache
def folded(point: int) -> str:
    """Return what a character is compared as: NFKC_Casefold, but for the iota below."""
    text = chr(point)
    while True:
        text = unicodedata.normalize("NFKD", text)
        kept = (each for each in text if ord(each) not in IGNORABLE)
        following = "".join(each if each == IOTA else each.casefold() for each in kept)
        following = unicodedata.normalize("NFKD", following)
        if following == text:
            return unicodedata.normalize("NFC", text)
        text = following


def points(text: str) -> str:
    """Return a text as the numbers of its characters."""
    return "".join(f"+{ord(each):X}" for each in text)


def rule(point: int) -> str:
    """Return the rule for one character."""
    if unicodedata.category(chr(point)) in ("Cn", "Cs") and point not in IGNORABLE:
        return "!" if any(point in plane for plane in IDEOGRAPHS) else "-"
    text = folded(point)
    if point not in IGNORABLE and not is_word(point):
        letters = [each for each in text if unicodedata.category(each)[0] in "LN"]
        if not letters:
            # Some of these have another normal form, with a mark of its own.
            return "_" if unicodedata.normalize("NFC", chr(point)) == chr(point) else "-"
    if text != chr(point):
        return "=" + points(text)
    parts = unicodedata.normalize("NFD", text)
    if IOTA in parts:
        return "~" + points(unicodedata.normalize("NFC", parts.replace(IOTA, "")) + LETTER)
    without_blanks = point in TANGUT or unicodedata.name(text).startswith(WITHOUT_BLANKS)
    return "!" if without_blanks else "."


def ranges(value: Callable[[int], object]) -> Iterator[tuple[int, int, object]]:
    """Yield each run of characters with the same value: the first, the number, the value."""
    start, current = 0, value(0)
    for point in POINTS[1:]:
        following = value(point)
        if following != current:
            yield start, point - start, current
            start, current = point, following
    yield start, POINTS[-1] + 1 - start, current


def characters() -> Iterator[str]:
    """Yield the entries of the table of characters."""
    for first, _, value in ranges(rule):
        yield f"{first:X}{value}"


def marks() -> Iterator[str]:
    """Yield the entries of the table of combining classes."""
    for first, number, value in ranges(lambda point: unicodedata.combining(chr(point))):
        if value:
            yield f"{first:X}:{value}:{number}"


def composed() -> Iterator[str]:
    """Yield the entries of the table of composed characters, without those that fold."""
    for point in POINTS:
        parts = unicodedata.decomposition(chr(point)).split()
        composes = unicodedata.normalize("NFC", chr(point)) == chr(point)
        if parts and parts[0][0] != "<" and composes and not rule(point).startswith("="):
            letter, mark = (int(part, 16) for part in parts)
            yield f"{point:X}:{letter:X}:{mark:X}"


def table(name: str, entries: Iterator[str], doc: str) -> str:
    """Return the definition of one table."""
    lines = wrap(" ".join(entries), 100, break_long_words=False, break_on_hyphens=False)
    return f'\n{name}: Final = """\n' + "\n".join(lines) + '\n"""' + doc


def module() -> str:
    """Return the text of the module."""
    return (
        HEADER.format(version=unicodedata.unidata_version)
        + table("CHARACTERS", characters(), CHARACTERS_DOC)
        + table("MARKS", marks(), MARKS_DOC)
        + table("COMPOSED", composed(), COMPOSED_DOC)
    )


if __name__ == "__main__":
    if unicodedata.unidata_version != UNICODE:
        sys.exit(f"This Python has Unicode {unicodedata.unidata_version}, not {UNICODE}.")
    TARGET.write_text(module(), encoding="ascii")
