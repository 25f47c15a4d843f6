"""The path of ``process_table_etl``: ``extract_table``, which writes the rows, counts them and writes the manifest.

It reads at the moment of its batch, which ``sub_etl`` holds for all tables before the first one is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reading import Job, run

from phasewise.lake.session import preload_extensions
from phasewise.project.config import load_project
from phasewise.settings import Settings
from phasewise.staging.extract import extract_table
from phasewise.staging.source_snapshot import open_snapshot

BATCH = "benchmark"


@contextmanager
def holding_moment(job: Job) -> Iterator[None]:
    (Path(job.folder) / "phasewise.toml").write_text(
        f'[project]\nname = "benchmark"\n[source]\nurl = "{job.url()}"\n', encoding="utf-8"
    )
    with open_snapshot(load_project(Path(job.folder)), settings(job), BATCH):
        yield


def read(job: Job) -> int:
    return extract_table(load_project(Path(job.folder)), settings(job), batch=BATCH, table=job.table).rows


def settings(job: Job) -> Settings:
    return Settings(threads=job.threads, extract_memory_limit=job.memory_limit)


# As in a flow run of the warm worker, whose signatures of extensions have been checked before the fork.
preload_extensions(("sqlite_scanner", "postgres_scanner"))
run(read, prepared=holding_moment)
