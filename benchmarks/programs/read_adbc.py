"""ADBC: a stream of Arrow batches, written as one Parquet file."""

from pathlib import Path

import adbc_driver_postgresql.dbapi
import adbc_driver_sqlite.dbapi
import pyarrow.parquet
from reading import Job, run


def read(job: Job) -> int:
    driver = adbc_driver_postgresql.dbapi if job.source == "postgresql" else adbc_driver_sqlite.dbapi
    rows = 0
    with driver.connect(job.address) as connection, connection.cursor() as cursor:
        cursor.execute(f"SELECT * FROM {job.table}")
        batches = cursor.fetch_record_batch()
        target = Path(job.folder) / "rows.parquet"
        with pyarrow.parquet.ParquetWriter(target, batches.schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
                rows += batch.num_rows
    return rows


run(read)
