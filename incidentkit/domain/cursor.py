"""Cursors: places in an order, as text that callers keep and pass back."""

from __future__ import annotations

import binascii
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode

_NUMBER = 8


def encode_cursor(*numbers: int) -> str:
    """Return numbers of 64 bits as a text that is safe in a URL and in a header."""
    packed = struct.pack(f">{len(numbers)}q", *numbers)
    return urlsafe_b64encode(packed).rstrip(b"=").decode()


def decode_cursor(cursor: str, count: int) -> tuple[int, ...]:
    """Return the numbers in a cursor from :func:`encode_cursor`.

    Raises:
        ValueError: If the text is not a cursor with this count of numbers.
    """
    try:
        packed = urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
    except (UnicodeEncodeError, binascii.Error):
        packed = b""
    numbers = struct.unpack(f">{count}q", packed) if len(packed) == count * _NUMBER else ()
    if not numbers or encode_cursor(*numbers) != cursor:
        raise ValueError("is not a cursor")
    return numbers
