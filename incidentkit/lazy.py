"""Load the public names of a package when they are first used (PEP 562).

Such a package, a lazy face, imports only this module, so importing it costs next to nothing::

    TYPE_CHECKING = False
    if TYPE_CHECKING:
        from package.module import Name
    else:
        from incidentkit.lazy import face

        __getattr__, __dir__ = face(globals(), {"package.module": ("Name",)})

Type checkers read the first branch, so they report a name that the package does not have.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def face(
    namespace: "dict[str, object]", modules: "Mapping[str, tuple[str, ...]]"
) -> "tuple[Callable[[str], object], Callable[[], list[str]]]":
    """Return ``__getattr__`` and ``__dir__`` for a package.

    Args:
        namespace: The package's globals; each name is stored there once it is loaded.
        modules: The public names, by the module that defines them.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def getattr_(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        namespace[name] = getattr(__import__(homes[name], fromlist=[name]), name)
        return namespace[name]

    def is_special(name: str) -> bool:
        return name.startswith("__")

    def dir_() -> list[str]:
        return sorted({*homes, *filter(is_special, namespace)})

    return getattr_, dir_
