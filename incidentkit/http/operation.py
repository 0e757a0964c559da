"""Describe an operation: its parameters, its body and its answers.

Routing, the reading of requests and the OpenAPI document are all derived from this description.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

from attrs import field, frozen
from starlette.requests import Request
from starlette.responses import Response

from incidentkit.domain.tokens import Scope
from incidentkit.domain.values import BYTES_PER_REQUEST, ITEMS_PER_REQUEST

Answer: TypeAlias = Callable[[Request, Mapping[str, Any]], Awaitable[Response]]


class EntityTags(str):
    """The value of ``If-Match`` or ``If-None-Match``: entity tags, or ``*``.

    The tag of an incident, and its version alone, may be weak: whatever has weakened a tag has
    encoded the answer, and left the incident as it is. Other tags are those of no incident.
    """

    __slots__ = ()

    TAG: Final = r'(?:W/)?"[!#-~\x80-\xff]*"'
    PATTERN: Final = rf"\*|(?:[ \t]*,)*[ \t]*{TAG}(?:[ \t]*,(?:[ \t]*{TAG})?)*[ \t]*"


EntityTagValue: TypeAlias = tuple[int | str, ...] | Literal["*"]
"""The versions and tags of incidents in a list of entity tags; or any."""

SAFETY: Final[Mapping[bytes, str]] = {
    name.lower().encode(): name
    for name in ("Idempotency-Key", "If-Match", "If-None-Match", "If-Unmodified-Since")
}
"""The headers with which a client guards a write, by their names in lower case."""

FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
"""The headers that announce a body; it may be empty."""


MAX_BODY: Final = 64 * 1024
"""Maximum bytes of a request's body, unless its operation has another limit."""

MAX_LARGE_BODY: Final = BYTES_PER_REQUEST
"""Maximum bytes of a body with many incidents or keys."""

MAX_ITEMS: Final = ITEMS_PER_REQUEST
"""Maximum number of incidents or keys in such a body."""


@frozen
class Parameter:
    """A parameter in the path, the query or a header.

    Attributes:
        name: Its name, also as an argument of the client.
        description: What it means.
        type: ``int``, ``bool``, ``datetime``, ``str``, :class:`EntityTags`, or an enum of strings.
        where: Which part of the request holds it.
        header: The name of the header, if a header holds it.
        minimum: The smallest integer, or the minimum length of a text.
        maximum: The largest integer, or the maximum length of a text.
        pattern: A regular expression for the whole text.
        default: The value of a missing parameter; None: no value.
        many: Whether it may be repeated; its value is then a list.
        required: Whether a request without it is refused.
        may_be_empty: Whether an empty value counts as missing.
        example: A value of it in the example of a body.
    """

    name: str
    description: str
    type: type[Any]
    where: Literal["path", "query", "header"] = "query"
    header: str = ""
    minimum: int | None = None
    maximum: int | None = None
    pattern: str | None = None
    default: Any = None
    many: bool = False
    required: bool = False
    may_be_empty: bool = False
    example: Any = None

    @cached_property
    def header_name(self) -> bytes:
        """The name of the header in lower case, as ASGI has it."""
        return self.header.lower().encode()


@frozen(eq=False)
class Operation:
    """A method of a path.

    Attributes:
        method: The HTTP method.
        path: The path's template; only its last part can be a parameter.
        name: The name of the route, and the id of the operation in the OpenAPI document.
        summary: What it does.
        answer: Makes the response from the request and its arguments.
        status: The status of a successful answer.
        returns: The model, or list of models, in a successful answer.
        success: Description of a successful answer.
        unchanged: Whether an answer can be 304.
        absent: Description of an answer 204, which has no content; empty: there is none.
        description: More about it, in Markdown; empty: the summary says it all.
        also: Other statuses of a successful answer, with a description of each.
        headers: Additional headers of a successful answer.
        streams: The model of each event, if the answer can be a stream of server-sent events.
        parameters: What the path, the query and the headers may hold.
        check: Raises :class:`~incidentkit.InvalidIncident` for parameters that ``answer`` would
            refuse. It is called only if the request has other faults, so that all are reported
            together. None: there are no rules.
        body: The model of the request's body; None: a body is refused, unless it has ``fields``.
        max_items: Maximum number of such models in an array as the body; 0: it is one model.
        max_body: Maximum bytes of the body.
        fields: The parameters in the query that may stand in an optional JSON body instead.
        problems: The statuses of its errors.
        members: The model with the additional members of a problem, by status.
        scope: One of these scopes is needed, if the app authenticates; None: it is open.
        bare: The model of an answer to a caller without the scope ``read``; None: the same.
        documented: Whether it is in the OpenAPI document.
    """

    method: str
    path: str
    name: str
    summary: str
    answer: Answer
    status: int = 200
    returns: Any = None
    success: str = ""
    unchanged: bool = False
    absent: str = ""
    description: str = ""
    also: Mapping[int, str] = field(factory=dict)
    headers: tuple[str, ...] = ()
    streams: type[Any] | None = None
    parameters: tuple[Parameter, ...] = ()
    check: Callable[..., object] | None = None
    body: type[Any] | None = None
    max_items: int = 0
    max_body: int = MAX_BODY
    fields: frozenset[str] = frozenset()
    problems: tuple[int, ...] = (400, 422, 500)
    members: Mapping[int, type[Any]] = field(factory=dict)
    documented: bool = True
    scope: frozenset[Scope] | None = field(kw_only=True)
    bare: type[Any] | None = None

    @cached_property
    def in_query(self) -> frozenset[str]:
        """The names of the parameters in the query."""
        return frozenset(one.name for one in self.parameters if one.where == "query")

    @cached_property
    def unsupported(self) -> Mapping[bytes, str]:
        """The headers that guard a write in a way that the operation cannot honor.

        A read is harmless to repeat, and may answer in full what a client has already.
        """
        taken = {one.header_name for one in self.parameters if one.where == "header"}
        if self.method == "GET":
            taken |= SAFETY.keys() - {b"if-match"}
        return {name: title for name, title in SAFETY.items() if name not in taken}

    @cached_property
    def watched(self) -> frozenset[bytes]:
        """The headers that the operation looks at, before its body."""
        taken = {one.header_name for one in self.parameters if one.where == "header"}
        return frozenset({*taken, *self.unsupported, *FRAMING})

    @cached_property
    def in_path(self) -> bool:
        """Whether a parameter is in the path."""
        return any(parameter.where == "path" for parameter in self.parameters)
