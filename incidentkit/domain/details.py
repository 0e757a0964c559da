"""Check the details of an incident: one JSON object of bounded size and depth."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import Any, Final

from incidentkit.domain.rules import PartError, storable
from incidentkit.domain.values import DETAILS_MAX_DEPTH, DETAILS_MAX_SIZE, MAX_ID

_ELLIPSIS: Final = "…"
_quote: Final = json.encoder.encode_basestring
_PLAIN_KEY: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)

_SHOWN: Final = 40
"""Maximum number of characters of a key in the path of a fault."""

_EXPONENT_FROM: Final = 1e16
"""The number from which on Python writes a float with an exponent."""

_NO_VALUE: Final = "must be a dict, a list, a tuple, a str, an int, a float, a bool or None"
_NO_INTEGER: Final = (
    f"must be an integer from {-MAX_ID - 1} to {MAX_ID}, or one that a double holds exactly"
)
_TOO_DEEP: Final = (
    f"is nested too deeply: details have at most {DETAILS_MAX_DEPTH} levels of objects and arrays"
)


class _TooLarge(ValueError):
    """The details exceed their size limit."""

    def __init__(self) -> None:
        super().__init__(
            f"must be at most {DETAILS_MAX_SIZE} bytes as compact JSON in UTF-8, with numbers "
            "written without exponents"
        )


def check_details(value: dict[str, Any]) -> dict[str, Any]:
    """Check details, and return a copy that both databases return as an equal value.

    A tuple becomes a list. A float of 1e16 or more becomes the equal int: PostgreSQL would read its
    text with an exponent as a different number.
    """
    return _copied(value)


def fit_details(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return details with the longest texts cut until they fit.

    Details that are valid, or that shorter texts alone cannot make valid, are returned unchanged.
    """
    try:
        return value if value is None else check_details(value)
    except _TooLarge:
        pass
    except ValueError:
        return value
    # The number of bytes to which the longest texts are cut, by bisection.
    fits, too_large = len(_quote(_ELLIPSIS).encode()), DETAILS_MAX_SIZE
    try:
        fitting = _copied(value, partial(_cut_storable, size=fits))
    except ValueError:
        return value
    while too_large - fits > 1:
        size = (fits + too_large) // 2
        try:
            fitting = _copied(value, partial(_cut, size=size))
        except _TooLarge:
            too_large = size
        else:
            fits = size
    return fitting


def _cut_storable(text: str, size: int) -> str:
    return _cut(storable(text), size)


def _cut(text: str, size: int) -> str:
    """Return a text, cut and marked with an ellipsis if its JSON has more than ``size`` bytes."""
    beginning = text[:size]
    if len(beginning) == len(text) and _size(text) <= size:
        return text
    short, long = 0, len(beginning)
    while long - short > 1:
        middle = (short + long) // 2
        if _size(text[:middle] + _ELLIPSIS) <= size:
            short = middle
        else:
            long = middle
    return text[:short] + _ELLIPSIS


def _size(text: str) -> int:
    """Return the number of bytes of a text as JSON."""
    return len(_quote(text).encode(errors="surrogatepass"))


def _copied(value: object, shorten: Callable[[str], str] = str.__str__) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")  # noqa: TRY004
    return _Copying(shorten).copy_object(value, 1)


class _Copying:
    """Copies details in one walk, which stops as soon as they are too large or too deep.

    Args:
        shorten: Returns the text to put into the copy.
    """

    def __init__(self, shorten: Callable[[str], str]) -> None:
        self._shorten = shorten
        self._left = DETAILS_MAX_SIZE

    def _take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise _TooLarge

    def copy_object(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        """Return a copy of an object at a depth."""
        self._open(len(value), depth)
        copy: dict[str, Any] = {}
        for key, each in value.items():
            name = self._key(key)
            try:
                copy[name] = self._value(each, depth)
            except PartError as error:
                error.at = _below(name) + error.at
                raise
        return copy

    def _array(self, value: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
        self._open(len(value), depth)
        copy = []
        for number, each in enumerate(value):
            try:
                copy.append(self._value(each, depth))
            except PartError as error:
                error.at = f"[{number}]{error.at}"
                raise
        return copy

    def _open(self, items: int, depth: int) -> None:
        if depth > DETAILS_MAX_DEPTH:
            raise PartError(_TOO_DEEP)
        # The brackets, and the commas between the items.
        self._take(2 + max(items - 1, 0))

    def _key(self, key: object) -> str:
        if not isinstance(key, str):
            raise PartError("must have strings as keys")
        # The colon.
        self._take(1)
        try:
            return self._text(key)
        except PartError as error:
            error.at = _below(key)
            raise

    def _text(self, value: str) -> str:
        # Counted before the text is checked, since it may be very long.
        self._take(2 + len(value))
        try:
            text = storable(str.__str__(value))
        except ValueError as error:
            raise PartError(str(error)) from None
        self._take(_size(text) - 2 - len(value))
        return text

    def _value(self, value: object, depth: int) -> Any:
        match value:
            case None | bool():
                self._take(5 if value is False else 4)
                return value
            case str():
                return self._text(self._shorten(value))
            case int():
                return self._integer(int(value))
            case float():
                return self._float(float(value))
            case dict():
                return self.copy_object(value, depth + 1)
            case list() | tuple():
                return self._array(value, depth + 1)
        raise PartError(_NO_VALUE)

    def _integer(self, value: int) -> int:
        if not -MAX_ID - 1 <= value <= MAX_ID and not _is_double(value):
            raise PartError(_NO_INTEGER)
        self._take(len(str(value)))
        return value

    def _float(self, value: float) -> int | float:
        if not isfinite(value):
            raise PartError("must be a finite number")
        if abs(value) >= _EXPONENT_FROM:
            return self._integer(int(value))
        # PostgreSQL has no negative zero.
        number = value + 0.0
        self._take(_digits(number))
        return number


def _is_double(value: int) -> bool:
    try:
        return float(value) == value
    except OverflowError:
        return False


def _digits(number: float) -> int:
    """Return the length of a number below 1e16 when it is written without an exponent."""
    mantissa, _, exponent = repr(number).partition("e-")
    if not exponent:
        return len(mantissa)
    return len(mantissa.replace(".", "")) + len("0.") + int(exponent) - 1


def _below(key: str) -> str:
    """Return the path from an object to a key."""
    if len(key) <= _SHOWN and _PLAIN_KEY.fullmatch(key):
        return f".{key}"
    shown = key if len(key) <= _SHOWN else key[:_SHOWN] + _ELLIPSIS
    # In ASCII: a key may hold a lone surrogate.
    return f"[{json.dumps(shown)}]"
