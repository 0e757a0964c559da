"""Open the socket on which the service listens, or take over an inherited one."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from typing import Final, TypeAlias

import click
from attrs import frozen

from incidentkit.cli.text import harmless

MODE: Final = 0o660
"""The permissions of a Unix socket by default: its owner and its group may connect."""


@frozen
class Tcp:
    """An address and a port.

    Attributes:
        host: The address.
        port: The port, 0 to 65535; 0 picks a free one.
    """

    host: str
    port: int


@frozen
class Inherited:
    """A listening socket that another program has opened.

    Attributes:
        fd: Its file descriptor.
    """

    fd: int


@frozen
class Unix:
    """A Unix socket.

    Attributes:
        path: Its file.
        mode: The permissions of the file.
    """

    path: str
    mode: int = MODE


Address: TypeAlias = Tcp | Inherited | Unix


@frozen
class Listener:
    """A socket that listens.

    Attributes:
        socket: The socket; it is closed by the server.
        name: Its name in the log.
        remove: Removes its file, if it has one that is still its own.
    """

    socket: socket.socket
    name: str
    remove: Callable[[], None]


def free_port(address: Tcp) -> int:
    """Return the port, or a free one for 0.

    Raises:
        ClickException: If the address or the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.create_server((address.host, address.port), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        # create_server() appends the address to the reason, as a Python tuple.
        reason = (error.strerror or "").partition(" (while")[0]
        raise click.ClickException(
            f"Cannot listen on {harmless(address.host)} port {address.port}: {reason}"
        ) from error


def inherit(address: Inherited) -> Listener:
    """Take over a socket that listens.

    Raises:
        UsageError: If there is no such socket.
    """
    try:
        listener = socket.socket(fileno=address.fd)
    except OSError as error:
        reason = "is not open" if error.errno == errno.EBADF else "is not a socket"
        raise click.UsageError(f"--fd {address.fd} {reason}") from error
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise click.UsageError(
            f"--fd {address.fd} is a socket that does not listen: call listen() on it first"
        )
    return Listener(listener, f"the socket {address.fd}", lambda: None)


def listen_on_file(address: Unix, backlog: int) -> Listener:
    """Create a Unix socket, in place of one that no program listens on any more.

    Args:
        address: Its file.
        backlog: Maximum number of connections that wait to be accepted.

    Raises:
        ClickException: If the file is something else or in use, or cannot be created.
    """
    path = os.path.abspath(address.path)  # noqa: PTH100
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        # No permissions until chmod, so that no other user connects in between.
        before = os.umask(0o777)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        os.chmod(path, address.mode)  # noqa: PTH101
        listener.listen(backlog)
        identity = _identity(os.lstat(path))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise click.ClickException(f"Cannot listen on {harmless(path)}: {reason}") from error

    def remove() -> None:
        try:
            if _identity(os.lstat(path)) == identity:
                os.unlink(path)  # noqa: PTH108
        except OSError:
            # It is gone, or must be left for the next start.
            return

    return Listener(listener, f"unix:{harmless(path)}", remove)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    # With the time, since the inode number may be reused.
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _remove_stale(path: str) -> None:
    """Remove a socket that no program listens on.

    Raises:
        OSError: If the file is something else, or in use.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, "the file exists and is not a socket: choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
        visitor.settimeout(0)
        try:
            visitor.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)  # noqa: PTH108
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, "another program listens on it")
