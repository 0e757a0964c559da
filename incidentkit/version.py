"""The versions of incidentkit and of its API over HTTP."""

from typing import Final

__version__: Final = "0.1.0"

API_VERSION: Final = "1.0"
"""The version of the API over HTTP: clients and services with the same major version fit."""

API_VERSION_HEADER: Final = "Incidentkit-Version"
"""The header in which each answer of the service carries it."""
