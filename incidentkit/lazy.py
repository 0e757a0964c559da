"""Lazy faces of packages: a name is loaded when it is first used (PEP 562).

A face needs no import but this one, so that importing the package costs next to nothing::

    TYPE_CHECKING = False
    if TYPE_CHECKING:
        from package.module import Name
    else:
        from incidentkit.lazy import face

        __getattr__, __dir__ = face(globals(), {"package.module": ("Name",)})

Type checkers read the first branch, and so report a name that the face does not have.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def face(
    namespace: "dict[str, object]", modules: "Mapping[str, tuple[str, ...]]"
) -> "tuple[Callable[[str], object], Callable[[], list[str]]]":
    """Return ``__getattr__`` and ``__dir__`` for a package.

    Args:
        namespace: The package's globals, which keep each name once it is loaded.
        modules: The names of each module.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def getattr_(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        namespace[name] = getattr(__import__(homes[name], fromlist=[name]), name)
        return namespace[name]

    def dir_() -> list[str]:
        return sorted({*namespace, *homes})

    return getattr_, dir_
