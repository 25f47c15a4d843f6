"""Phasewise: its embedded stack, its deployments, its orchestrator."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path

from benchmarks.harness import postgresql, prefect_api, processes
from benchmarks.systems import Context, Submit
from benchmarks.systems.programs import PROGRAMS, Program
from phasewise.stack.control import running_stack
from phasewise.stack.supervisor import client_environment

POOL = "bench"


class Phasewise:
    """The embedded default: server on SQLite, warm-process workers."""

    most_tables: int | None = None

    def version(self) -> str:
        return f"{version('phasewise')} (prefect {version('prefect')})"

    @contextlib.contextmanager
    def running(self, context: Context) -> Iterator[Submit]:
        with self.serving(context) as api:
            yield lambda load: prefect_api.run_topology(api, load)

    def serving(self, context: Context) -> AbstractContextManager[str]:
        """Run the stack with the topology deployed for the time of the block; yield the address of its API."""
        return self._stack(context, {})

    @contextlib.contextmanager
    def _stack(self, context: Context, server_env: dict[str, str]) -> Iterator[str]:
        home = context.home / "stack"
        with running_stack(home, pool=POOL, project_env=server_env) as info:
            env = processes.clean_environment(
                **client_environment(home, info.api_url), PHASEWISE_TABLE_CONCURRENCY=str(context.parallel)
            )
            deploy = [sys.executable, PROGRAMS / "phasewise_flows.py", POOL]
            processes.run(deploy, log=context.home / "deploy.log", env=env, cwd=context.home)
            yield info.api_url


class PhasewisePostgresql(Phasewise):
    """The same with the server's database on PostgreSQL."""

    @contextlib.contextmanager
    def serving(self, context: Context) -> Iterator[str]:
        with postgresql.running(context.home / "postgresql", context.environments) as address:
            url = {"PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{address}"}
            with self._stack(context, url) as api:
                yield api


class PhasewiseLocal(Program):
    """The same phases in one process tree, without a server: a program that is warm, as those of the peers are."""

    name = "phasewise_local"

    def version(self) -> str:
        return Phasewise().version()

    def python(self, context: Context) -> Path:
        return Path(sys.executable)

    def environment(self, context: Context) -> dict[str, str]:
        home = context.home / "prefect"
        return {"PHASEWISE_TABLE_CONCURRENCY": str(context.parallel), "PREFECT_HOME": str(home)}
