"""What is to be said of rows that are not reached: what was tried, and what stands in the way."""

from __future__ import annotations

from typing import Final

REMARKS: Final[dict[str, str]] = {}
"""By what a row compares and with whom, as ``what / against``."""
