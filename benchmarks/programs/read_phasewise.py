"""The path of ``process_table_etl``: ``extract_table``, which writes the rows, counts them and writes the manifest."""

from pathlib import Path

from reading import Job, run

from phasewise import lake
from phasewise.project import load_project
from phasewise.settings import Settings
from phasewise.staging import extract_table


def read(job: Job) -> int:
    (Path(job.folder) / "phasewise.toml").write_text(
        f'[project]\nname = "benchmark"\n[source]\nurl = "{job.url()}"\n', encoding="utf-8"
    )
    project = load_project(Path(job.folder))
    settings = Settings(threads=job.threads, extract_memory_limit=job.memory_limit)
    return extract_table(project, settings, batch="benchmark", table=job.table).rows


# As in a flow run of the warm worker, whose signatures of extensions have been checked before the fork.
lake.preload_extensions(("sqlite_scanner", "postgres_scanner"))
run(read)
