"""The REST service: a Starlette app around a client, to run alone or to mount in another app."""

from incidentkit.domain.errors import MissingDependency

try:
    from incidentkit.http.app import create_app, lifespan
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "starlette":
        raise
    raise MissingDependency("starlette", extra="server") from error

__all__ = ["create_app", "lifespan"]
