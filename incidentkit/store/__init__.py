"""Where incidents are kept: SQLite or PostgreSQL, chosen by URL.

Each name is loaded when it is first used (PEP 562).
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.opening import store_from_url, store_on
    from incidentkit.store.idempotency import Idempotency
    from incidentkit.store.options import StoreOptions
    from incidentkit.store.page import Page
    from incidentkit.store.ports import IncidentStore, StoreOperations
    from incidentkit.store.request_log import RequestRecord
    from incidentkit.store.sql.tables import keep_out_of_autogenerate

_HOMES = {
    "Idempotency": "incidentkit.store.idempotency",
    "IncidentStore": "incidentkit.store.ports",
    "Page": "incidentkit.store.page",
    "RequestRecord": "incidentkit.store.request_log",
    "StoreOperations": "incidentkit.store.ports",
    "StoreOptions": "incidentkit.store.options",
    "keep_out_of_autogenerate": "incidentkit.store.sql.tables",
    "store_from_url": "incidentkit.opening",
    "store_on": "incidentkit.opening",
}

__all__ = [
    "Idempotency",
    "IncidentStore",
    "Page",
    "RequestRecord",
    "StoreOperations",
    "StoreOptions",
    "keep_out_of_autogenerate",
    "store_from_url",
    "store_on",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(__import__(_HOMES[name], fromlist=[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
