"""Airflow 3: API server, DAG processor, scheduler with LocalExecutor, on PostgreSQL as its documentation advises."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import environments, postgresql, processes
from benchmarks.harness.load import Load, Measured
from benchmarks.harness.prefect_api import seconds
from benchmarks.systems import Context, Submit
from benchmarks.systems.programs import PROGRAMS


class Airflow:
    """Airflow with room for as many tables at once as the others have."""

    most_tables: int | None = None

    def version(self) -> str:
        return environments.REQUIREMENTS["airflow"][0]

    @contextlib.contextmanager
    def running(self, context: Context) -> Iterator[Submit]:
        binaries = environments.ensure("airflow", context.environments) / "bin"
        home, port = context.home, processes.free_port()
        with postgresql.running(home / "postgresql", context.environments) as address, contextlib.ExitStack() as stack:
            env = _environment(context, binaries, address, port)
            common: dict[str, Any] = {"env": env, "cwd": home}
            _write_dags(home)
            processes.run([binaries / "airflow", "db", "migrate"], log=home / "migrate.log", **common)
            for part in ("api-server", "dag-processor", "scheduler"):
                stack.enter_context(processes.service([binaries / "airflow", part], log=home / f"{part}.log", **common))
            base = f"http://127.0.0.1:{port}"
            token = processes.wait_until(
                lambda: processes.request(f"{base}/auth/token")["access_token"], "Airflow's API", seconds=180
            )
            for load in context.loads:
                dag = f"{base}/api/v2/dags/{load.name}"
                processes.wait_until(lambda dag=dag: processes.request(dag, token=token), f"the DAG {dag}", seconds=180)
            yield lambda load: _run(base, token, load)


def _environment(context: Context, binaries: Path, address: str, port: int) -> dict[str, str]:
    # Repeated starts share the database, and what is signed in it.
    key = context.home / "key"
    if not key.exists():
        key.write_text(secrets.token_hex(32))
    loads = [{"name": load.name, "tables": load.tables, "seconds": load.seconds} for load in context.loads]
    base = f"http://127.0.0.1:{port}"
    settings = {
        "CORE__EXECUTOR": "LocalExecutor",
        # One more than tables at once: for pre, which runs beside them.
        "CORE__PARALLELISM": str(context.parallel + 1),
        "CORE__MAX_ACTIVE_TASKS_PER_DAG": str(context.parallel + 1),
        "CORE__DAGS_FOLDER": str(context.home / "dags"),
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "CORE__EXECUTION_API_SERVER_URL": f"{base}/execution/",
        "DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://{address}",
        "API__HOST": "127.0.0.1",
        "API__PORT": str(port),
        "API__BASE_URL": base,
        "API__SECRET_KEY": key.read_text(),
        "API_AUTH__JWT_SECRET": key.read_text(),
        "USAGE_DATA_COLLECTION__ENABLED": "False",
    }
    return processes.clean_environment(
        AIRFLOW_HOME=str(context.home),
        BENCHMARK_LOADS=json.dumps(loads),
        PATH=f"{binaries}:/usr/bin:/bin",
        **{f"AIRFLOW__{key}": value for key, value in settings.items()},
    )


def _write_dags(home: Path) -> None:
    (home / "dags").mkdir(exist_ok=True)
    shutil.copy(PROGRAMS / "airflow_dag.py", home / "dags")


def _run(base: str, token: str, load: Load) -> Measured:
    runs = f"{base}/api/v2/dags/{load.name}/dagRuns"
    run_id = processes.request(runs, {"logical_date": None}, token=token)["dag_run_id"]

    def final() -> dict[str, Any] | None:
        run: dict[str, Any] = processes.request(f"{runs}/{run_id}", token=token)
        return run if run["state"] in ("success", "failed") else None

    run = processes.wait_until(final, load.name, seconds=900, pause=1)
    if run["state"] != "success":
        raise processes.Broken(f"{load.name} ended {run['state']}")
    return Measured(submitted=seconds(run["queued_at"]), completed=seconds(run["end_date"]))
