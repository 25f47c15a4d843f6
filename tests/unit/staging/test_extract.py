"""Extraction: complete or nothing, once per batch, and clear about a disk that is full."""

from __future__ import annotations

import resource
import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest

from phasewise.errors import StagingError, TableMissing
from phasewise.lake.session import open_session, preload_extensions
from phasewise.project.config import Project
from phasewise.settings import Settings
from phasewise.staging.batch import begin_batch
from phasewise.staging.extract import _hold_folder, extract_table
from phasewise.staging.manifest import Manifest, list_manifests, staged_files
from tests.staged import read_manifest

SETTINGS = Settings(threads=1, memory_limit="256MB", min_free_bytes=0)


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner",))


def extract(project: Project, table: str, batch: str = "b1") -> Manifest:
    return extract_table(project, SETTINGS, batch=batch, table=table)


def count_rows(paths: list[Path]) -> int:
    with open_session(SETTINGS, extensions=()) as connection:
        return connection.execute("SELECT count(*) FROM read_parquet(?)", [list(map(str, paths))]).fetchone()[0]


def test_a_manifest_says_what_was_extracted(project: Project):
    manifest = extract(project, "player")

    assert (manifest.table, manifest.rows, manifest.source_rows, manifest.key) == ("player", 1000, 1000, ("id",))
    assert [(c.name, c.type) for c in manifest.columns] == [("id", "BIGINT"), ("name", "VARCHAR")]
    files = staged_files(project, manifest)
    assert sum(path.stat().st_size for path in files) == manifest.size_bytes
    assert count_rows(files) == 1000
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert read_manifest(project, "b1", "player") == manifest


def test_a_table_without_rows_is_staged_with_its_columns(project: Project):
    manifest = extract(project, "team")

    assert (manifest.rows, manifest.source_rows) == (0, 0)
    assert count_rows(staged_files(project, manifest)) == 0


def test_a_staged_table_is_not_extracted_again(project: Project):
    first = extract(project, "player")
    (project.root / "source.db").unlink()

    assert extract(project, "player") == first


def test_files_without_a_manifest_count_for_nothing_and_are_removed(project: Project):
    folder = project.staging / "b1" / "player"
    folder.mkdir(parents=True)
    (folder / "half.parquet").write_bytes(b"PAR1")

    assert list_manifests(project, "b1") == []
    manifest = extract(project, "player")

    assert not (folder / "half.parquet").exists()
    assert count_rows(staged_files(project, manifest)) == 1000


def test_a_killed_extraction_leaves_nothing_that_looks_complete(project: Project):
    code = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from phasewise.project.config import load_project
        from phasewise.settings import Settings
        from phasewise.staging import extract
        extract.write_shared = lambda project, path, text: os.kill(os.getpid(), signal.SIGKILL)
        extract.extract_table(load_project(Path(sys.argv[1])), Settings(), batch="b1", table="player")
    """)
    done = subprocess.run([sys.executable, "-c", code, str(project.root)], timeout=50, check=False)

    assert done.returncode == -signal.SIGKILL
    assert list((project.staging / "b1" / "player").glob("*.parquet"))
    assert list_manifests(project, "b1") == []
    assert extract(project, "player").rows == 1000
    assert len(list((project.staging / "b1" / "player").glob("*.parquet"))) == 1


def test_one_process_at_a_time_extracts_a_table(project: Project):
    with (
        _hold_folder(project.staging / "b1" / "player", "player"),
        pytest.raises(StagingError, match='Another process is extracting table "player"'),
    ):
        extract(project, "player")


def test_a_failed_extraction_leaves_no_file(project: Project):
    with closing(sqlite3.connect(project.root / "source.db")) as source, source:
        source.execute("INSERT INTO team VALUES (1, x'00')")

    with pytest.raises(Exception, match="city"):
        extract(project, "team")

    assert list((project.staging / "b1" / "team").glob("*.parquet")) == []


def test_a_table_that_the_source_lacks_is_named(project: Project):
    with pytest.raises(TableMissing, match=r'no table "plaier".*It has: player, team'):
        extract(project, "plaier")


def test_no_room_for_the_file_names_folder_free_bytes_and_what_to_do(project: Project):
    # The limit on a file's size ends a write as a full disk does, without filling one.
    begin_batch(project, "b1", ["player"])
    with closing(sqlite3.connect(project.root / "source.db")) as source, source:
        source.execute("INSERT INTO team SELECT id, hex(randomblob(500)) FROM player")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StagingError, match=r"b1/team cannot be written \(\d+ bytes free\).*resume"):
            extract(project, "team")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)

    assert extract(project, "team").rows == 1000


def test_values_of_four_mebibytes_are_staged(project: Project):
    with closing(sqlite3.connect(project.root / "source.db")) as source, source:
        source.execute("CREATE TABLE big (id INTEGER, body TEXT)")
        source.execute("INSERT INTO big SELECT id, hex(randomblob(2097152)) FROM player WHERE id < 10")

    assert extract(project, "big").rows == 10


def test_too_little_memory_is_an_error_that_names_the_setting(project: Project):
    with closing(sqlite3.connect(project.root / "source.db")) as source, source:
        source.execute("INSERT INTO team SELECT id, hex(randomblob(500000)) FROM player WHERE id < 100")

    with pytest.raises(StagingError, match="PHASEWISE_EXTRACT_MEMORY_LIMIT"):
        extract_table(project, SETTINGS.model_copy(update={"extract_memory_limit": "60MB"}), batch="b1", table="team")
