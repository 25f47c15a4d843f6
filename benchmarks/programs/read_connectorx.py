"""ConnectorX: the whole table as one Arrow table, written as one Parquet file."""

from pathlib import Path

import connectorx
import pyarrow.parquet
from reading import Job, run


def read(job: Job) -> int:
    url = job.address if job.source == "postgresql" else f"sqlite://{job.address}"
    table = connectorx.read_sql(url, f"SELECT * FROM {job.table}", return_type="arrow")
    pyarrow.parquet.write_table(table, Path(job.folder) / "rows.parquet", compression="zstd")
    return int(table.num_rows)


run(read)
