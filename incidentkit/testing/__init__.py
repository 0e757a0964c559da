"""Test an application that uses incidentkit, on a private database in memory.

pytest finds the fixtures automatically. The functions also work with unittest.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.testing.assertions import (
        all_incidents,
        assert_history,
        assert_incident_opened,
        assert_no_incident,
    )
    from incidentkit.testing.clients import private_async_incidents, private_incidents
    from incidentkit.testing.clock import FrozenClock, frozen_clock
    from incidentkit.testing.database import PrivateDatabase, private_url
    from incidentkit.testing.faults import Failures, failing, slow
    from incidentkit.testing.recording import recording
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(
        globals(),
        {
            "incidentkit.testing.assertions": (
                "all_incidents",
                "assert_history",
                "assert_incident_opened",
                "assert_no_incident",
            ),
            "incidentkit.testing.clients": ("private_async_incidents", "private_incidents"),
            "incidentkit.testing.clock": ("FrozenClock", "frozen_clock"),
            "incidentkit.testing.database": ("PrivateDatabase", "private_url"),
            "incidentkit.testing.faults": ("Failures", "failing", "slow"),
            "incidentkit.testing.recording": ("recording",),
        },
    )

__all__ = [
    "Failures",
    "FrozenClock",
    "PrivateDatabase",
    "all_incidents",
    "assert_history",
    "assert_incident_opened",
    "assert_no_incident",
    "failing",
    "frozen_clock",
    "private_async_incidents",
    "private_incidents",
    "private_url",
    "recording",
    "slow",
]
