"""Settings of the machine, read from ``PHASEWISE_*`` environment variables.

What belongs to a project (its source, tables, audits, marts) is in ``phasewise.toml``; what belongs to the
machine that runs it is here. Prefect's own settings keep their own names (``PREFECT_API_URL``, …).
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ByteSize, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Read once at the edge (the CLI, a flow) and passed on as an argument."""

    model_config = SettingsConfigDict(env_prefix="PHASEWISE_", frozen=True, extra="ignore")

    project: Path | None = Field(
        default=None,
        description="Folder with phasewise.toml. Default: the nearest one above the current folder, "
        "else examples/baseball.",
    )
    home: Path | None = Field(
        default=None,
        description="Folder for the embedded stack (server, workers, logs). Default: .phasewise in the checkout, "
        "else in the project's folder.",
    )
    memory_limit: str = Field(
        default="1GB",
        description="Memory that DuckDB may use in one flow run that audits, publishes or cleans, such as 512MB.",
    )
    extract_memory_limit: str = Field(
        default="200MB",
        description="Memory that DuckDB may use while it extracts a table. Many are extracted at the same time, so it "
        "is less than what an audit or publishing gets.",
    )
    temp_limit: str = Field(
        default="10GB", description="Disk that DuckDB may use for temporary files in one flow run, such as 10GB."
    )
    threads: int = Field(default=2, ge=1, description="Threads that DuckDB may use in one flow run.")
    partition_rows: int = Field(
        default=10_000_000,
        ge=0,
        description="Rows above which a table is split into partitions, each with its own flow run; 0: never.",
    )
    connect_timeout: float = Field(default=10.0, gt=0, description="Seconds to wait for a source database to answer.")
    min_free_bytes: int = Field(
        default=256 * 1024 * 1024,
        ge=0,
        description="Free bytes that staging and the warehouse need before a batch starts.",
    )
    batch_retention_days: float = Field(
        default=7.0, ge=0, description="Days that the staging of an unpublished batch is kept for a resume."
    )
    source_snapshot_hours: float = Field(
        default=24.0,
        gt=0,
        description="Hours after which a batch gives up the moment of the source that it holds. Tables that are "
        "still missing then fail.",
    )
    snapshot_retention_days: float = Field(
        default=7.0, ge=0, description="Days that snapshots of the warehouse are kept before cleanup expires them."
    )
    lock_timeout: float = Field(
        default=300.0, ge=0, description="Seconds to wait while another process writes to the warehouse."
    )
    workers: int = Field(default=1, ge=1, description="Workers that the embedded stack starts.")
    table_concurrency: int = Field(
        default=8, ge=1, description="Flow runs of the work queue `tables` that may run at the same time."
    )
    orchestrator_concurrency: int = Field(
        default=32, ge=1, description="Flow runs of the work queue `orchestrators` that may run at the same time."
    )
    poll_seconds: float = Field(
        default=15.0, gt=0, description="Seconds between the batched reads that check what events reported."
    )
    drain_seconds: float = Field(
        default=5.0,
        ge=0,
        description="Seconds that a stopping worker lets its flow runs finish. Then it stops and reschedules them.",
    )
    run_memory_limit: ByteSize | None = Field(
        default=None,
        description="Memory that a process of a flow run may use, such as 2GB. DuckDB is only a part of it: "
        "leave 512MB on top of DuckDB's limits. Default: no limit.",
    )
    forkserver_runs: int = Field(
        default=1000, ge=1, description="Flow runs after which a worker forks from a new forkserver."
    )
    crash_retries: int = Field(
        default=1, ge=0, description="Times that a crashed flow run is run again before it counts as failed."
    )
    lost_after_seconds: float = Field(
        default=15.0,
        ge=15,
        description="Seconds without a heartbeat after which a worker counts as dead and its flow runs as crashed.",
    )
    cancel_grace_seconds: float = Field(
        default=10.0, ge=0, description="Seconds that a cancelled flow run gets to end before it is killed."
    )
    patches: str = Field(
        default="on",
        pattern=r"^(on|off|-[a-z-]+(,-[a-z-]+)*)$",
        description="`off`: let Prefect's own code run, without the patches that can be left out (`phasewise doctor`): "
        "slower. `-NAME` or `-NAME,-NAME`: leave out these.",
    )


def find_checkout() -> Path | None:
    """Return the checkout that this package is imported from, or None when it was installed as a wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "phasewise").is_dir() else None


def find_home(settings: Settings) -> Path:
    """Return the folder of the embedded stack; it need not exist yet.

    It belongs to the checkout and not to the project, so that all projects of a checkout share one running stack.
    """
    if settings.home is not None:
        return settings.home.expanduser().resolve()
    base = find_checkout() or Path.cwd()
    return base / ".phasewise"
