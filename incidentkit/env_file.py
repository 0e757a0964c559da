"""Read a ``.env`` file, and refuse one that another user owns."""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from pathlib import Path
from typing import Final

from attrs import field, frozen
from dotenv.parser import Binding, parse_stream

from incidentkit.domain.errors import InvalidSettings

logger = logging.getLogger("incidentkit")

_REFERENCE: Final = re.compile(r"\$\{[^}]*\}")
_SINGLE_QUOTED: Final = re.compile(r"\s*(?:export\s+)?(?:'[^']+'|[^=#\s]+)\s*=\s*'")


@frozen
class EnvFile:
    """The contents of a file.

    Attributes:
        path: The file, absolute.
        values: The value of each variable as written; None: it has no value.
        references: The variables with a ``${NAME}`` outside single quotes. It stands for another
            variable in shells and in Docker Compose, and is never replaced here.
    """

    path: Path
    values: dict[str, str | None] = field(repr=False)
    references: frozenset[str]


def read_env_file(path: str | os.PathLike[str]) -> EnvFile | None:
    """Return the variables of a file; None if it is missing or is not a file.

    Logs a warning for a file that all users or members of another group can write to, and for a
    line that is not an assignment, without its text.

    Raises:
        InvalidSettings: If the file belongs to a user other than that of the process and root,
            cannot be read, or is not UTF-8.
    """
    name = os.fspath(path)
    try:
        if not Path(path).is_file():
            return None
        with Path(path).open(encoding="utf-8-sig") as file:
            _check_owner(name, os.lstat(path), os.fstat(file.fileno()))
            bindings = list(parse_stream(file))
    except UnicodeError:
        reason = "it is not UTF-8"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    else:
        return EnvFile(Path(path).absolute(), *_variables(name, bindings))
    raise InvalidSettings(name, f"cannot be read: {reason}")


def _variables(name: str, bindings: list[Binding]) -> tuple[dict[str, str | None], frozenset[str]]:
    values: dict[str, str | None] = {}
    references: set[str] = set()
    for binding in bindings:
        if binding.error:
            logger.warning("%s: line %d is not an assignment", name, binding.original.line)
        if binding.key is None:
            continue
        values[binding.key] = binding.value
        references.discard(binding.key)
        if _REFERENCE.search(binding.value or "") and not _SINGLE_QUOTED.match(
            binding.original.string
        ):
            references.add(binding.key)
    return values, frozenset(references)


def _check_owner(name: str, *found: os.stat_result) -> None:
    """Refuse a file, or a symbolic link to it, of another user; warn if others can write it."""
    if sys.platform == "win32":
        return
    for each in found:
        if each.st_uid not in (os.geteuid(), 0):
            raise InvalidSettings(
                name,
                f"belongs to another user (uid {each.st_uid}): replace it with your own copy, or "
                "set its variables in the environment",
            )
    mode, group = found[-1].st_mode, found[-1].st_gid
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and group != os.getegid()):
        logger.warning("%s can be written by other users: run chmod go-w %s", name, name)
