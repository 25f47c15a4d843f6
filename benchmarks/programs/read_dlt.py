"""dlt's ``sql_database`` source into Parquet files of its filesystem destination; the second argument: the backend."""

import os
import sys
from pathlib import Path

import dlt
from dlt.destinations import filesystem
from dlt.sources.sql_database import sql_table
from reading import Job, run


def read(job: Job) -> int:
    folder = Path(job.folder)
    pipeline = dlt.pipeline(
        "benchmark",
        pipelines_dir=str(folder / "pipeline"),
        destination=filesystem(bucket_url=(folder / "out").as_uri()),
        dataset_name="tpch",
    )
    backend = sys.argv[2]
    # SQLAlchemy and ConnectorX want different drivers and count the slashes before an absolute path differently.
    kwargs = {"conn": job.url().replace("sqlite:////", "sqlite:///")} if backend == "connectorx" else {}
    url = job.url().replace("postgresql:", "postgresql+psycopg2:")
    pipeline.run(
        sql_table(credentials=url, table=job.table, backend=backend, backend_kwargs=kwargs),
        loader_file_format="parquet",
    )
    return int(pipeline.last_trace.last_normalize_info.row_counts[job.table])


os.environ["RUNTIME__DLTHUB_TELEMETRY"] = "false"
run(read)
