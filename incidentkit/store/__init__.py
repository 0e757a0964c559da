"""Where incidents are kept: SQLite or PostgreSQL, chosen by URL."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.domain.commands import (
        NoteAddition,
        Resolution,
        Resolutions,
        StatusChange,
    )
    from incidentkit.domain.queries import SearchQuery
    from incidentkit.domain.replays import Replay
    from incidentkit.domain.transitions import Transitions
    from incidentkit.opening import store_from_url, store_on
    from incidentkit.store.access_tokens import AccessTokens
    from incidentkit.store.idempotency import Idempotency
    from incidentkit.store.options import StoreOptions
    from incidentkit.store.page import Page
    from incidentkit.store.ports import IncidentStore, StoreOperations
    from incidentkit.store.request_log import RequestRecord
    from incidentkit.store.sql.tables import keep_out_of_autogenerate
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(
        globals(),
        {
            "incidentkit.domain.commands": (
                "NoteAddition",
                "Resolution",
                "Resolutions",
                "StatusChange",
            ),
            "incidentkit.domain.queries": ("SearchQuery",),
            "incidentkit.domain.replays": ("Replay",),
            "incidentkit.domain.transitions": ("Transitions",),
            "incidentkit.opening": (
                "store_from_url",
                "store_on",
            ),
            "incidentkit.store.access_tokens": ("AccessTokens",),
            "incidentkit.store.idempotency": ("Idempotency",),
            "incidentkit.store.options": ("StoreOptions",),
            "incidentkit.store.page": ("Page",),
            "incidentkit.store.ports": (
                "IncidentStore",
                "StoreOperations",
            ),
            "incidentkit.store.request_log": ("RequestRecord",),
            "incidentkit.store.sql.tables": ("keep_out_of_autogenerate",),
        },
    )

__all__ = [
    "AccessTokens",
    "Idempotency",
    "IncidentStore",
    "NoteAddition",
    "Page",
    "Replay",
    "RequestRecord",
    "Resolution",
    "Resolutions",
    "SearchQuery",
    "StatusChange",
    "StoreOperations",
    "StoreOptions",
    "Transitions",
    "keep_out_of_autogenerate",
    "store_from_url",
    "store_on",
]
