"""The wire format: incidents and events as JSON, the same over HTTP and in caches."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.wire.conversion import (
        NewNote,
        decode_event,
        decode_incident,
        decode_incidents,
        decode_optional,
        decode_optionals,
        encode_event,
        encode_events,
        wire_converter,
    )
    from incidentkit.wire.encoding import (
        dump_json,
        encode_incident,
        encode_incidents,
        encode_object,
        encode_optional,
        encode_optionals,
        encode_rows,
    )
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(
        globals(),
        {
            "incidentkit.wire.conversion": (
                "NewNote",
                "decode_event",
                "decode_incident",
                "decode_incidents",
                "decode_optional",
                "decode_optionals",
                "encode_event",
                "encode_events",
                "wire_converter",
            ),
            "incidentkit.wire.encoding": (
                "dump_json",
                "encode_incident",
                "encode_incidents",
                "encode_object",
                "encode_optional",
                "encode_optionals",
                "encode_rows",
            ),
        },
    )

__all__ = [
    "NewNote",
    "decode_event",
    "decode_incident",
    "decode_incidents",
    "decode_optional",
    "decode_optionals",
    "dump_json",
    "encode_event",
    "encode_events",
    "encode_incident",
    "encode_incidents",
    "encode_object",
    "encode_optional",
    "encode_optionals",
    "encode_rows",
    "wire_converter",
]
