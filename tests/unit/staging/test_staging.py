"""Staging: complete or nothing, once per batch, and clear about a disk that is full."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from phasewise.errors import NothingStaged, StagingError, TableMissing
from phasewise.lake.quoting import quote_identifier
from phasewise.lake.session import open_session, preload_extensions
from phasewise.project.config import Project, load_project
from phasewise.settings import Settings
from phasewise.staging.batch import (
    begin_batch,
    find_publishable_batch,
    list_batches,
    mark_published,
    new_batch_id,
    prepare_staging,
)
from phasewise.staging.extract import _hold_folder, extract_table
from phasewise.staging.manifest import Manifest, folder_name, list_manifests, read_manifest, staged_files

SETTINGS = Settings(threads=1, memory_limit="256MB", min_free_bytes=0)


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner",))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "phasewise.toml").write_text('[project]\nname = "t"\n[source]\nurl = "sqlite:///source.db"\n')
    with closing(sqlite3.connect(tmp_path / "source.db")) as source, source:
        source.execute("CREATE TABLE player (id INTEGER PRIMARY KEY, name TEXT)")
        source.executemany("INSERT INTO player VALUES (?, ?)", [(i, f"name {i}") for i in range(1000)])
        source.execute("CREATE TABLE team (id INTEGER PRIMARY KEY, city TEXT)")
    return load_project(tmp_path)


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

    with pytest.raises(NothingStaged):
        read_manifest(project, "b1", "player")
    manifest = extract(project, "player")

    assert not (folder / "half.parquet").exists()
    assert count_rows(staged_files(project, manifest)) == 1000


@pytest.mark.parametrize("damage", ["missing file", "short file", "no json", "older version"])
def test_a_manifest_that_does_not_fit_its_files_is_not_complete(project: Project, damage: str):
    manifest = extract(project, "player")
    file = staged_files(project, manifest)[0]
    path = file.parent / "manifest.json"
    if damage == "missing file":
        file.unlink()
    elif damage == "short file":
        os.truncate(file, 10)
    elif damage == "no json":
        path.write_text("{")
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))

    assert list_manifests(project, "b1") == []
    assert count_rows(staged_files(project, extract(project, "player"))) == 1000


def test_a_killed_extraction_leaves_nothing_that_looks_complete(project: Project):
    code = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from phasewise.staging import extract
        from phasewise.project.config import load_project
        from phasewise.settings import Settings
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


def test_staging_that_is_not_a_folder_is_an_error_that_names_it(project: Project):
    project.staging.parent.mkdir()
    project.staging.write_text("a file")

    with pytest.raises(StagingError, match="staging cannot be written"):
        prepare_staging(project, SETTINGS)
    with pytest.raises(StagingError, match="cannot be written"):
        extract(project, "player")


@contextmanager
def without_root() -> Iterator[None]:
    """Be someone whom permissions hold back: root may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_read_only_staging_is_an_error_that_names_it(project: Project):
    # Below a folder that others may enter, which the folders of pytest are not.
    with tempfile.TemporaryDirectory() as open_folder:
        Path(open_folder).chmod(0o755)
        elsewhere = project.model_copy(update={"staging": Path(open_folder) / "staging"})
        elsewhere.staging.mkdir(mode=0o555)

        with without_root(), pytest.raises(StagingError, match="cannot be written"):
            prepare_staging(elsewhere, SETTINGS)


def test_too_little_free_space_is_found_beforehand(project: Project):
    with pytest.raises(StagingError, match="bytes free, and a batch needs"):
        prepare_staging(project, SETTINGS.model_copy(update={"min_free_bytes": 10**18}))


def test_preparing_leaves_nothing_behind(project: Project):
    prepare_staging(project, SETTINGS)

    assert list(project.staging.iterdir()) == []


def test_a_batch_keeps_its_first_plan(project: Project):
    first = begin_batch(project, "b1", ["player", "team"])

    assert begin_batch(project, "b1", ["player"]) == first
    assert first.tables == ("player", "team")


def test_a_batch_is_complete_when_every_planned_table_is_staged(project: Project):
    begin_batch(project, "b1", ["player", "team"])
    extract(project, "player")
    assert [(b.tables, b.missing, b.is_complete) for b in list_batches(project)] == [(("player",), ("team",), False)]
    assert find_publishable_batch(project) is None

    extract(project, "team")

    assert find_publishable_batch(project) == "b1"


def test_a_single_extraction_is_a_batch_of_its_own(project: Project):
    batch = new_batch_id()

    extract(project, "player", batch)

    assert find_publishable_batch(project) == batch


def test_a_published_batch_hides_all_older_ones(project: Project):
    for batch in ("older", "newer"):
        extract(project, "player", batch)

    mark_published(project, "newer", 7)

    assert [(b.id, b.snapshot) for b in list_batches(project)] == [("older", None), ("newer", 7)]
    assert find_publishable_batch(project) is None


def test_a_folder_without_a_plan_is_no_batch(project: Project):
    (project.staging / "stray").mkdir(parents=True)
    (project.staging / "broken").mkdir()
    (project.staging / "broken" / "batch.json").write_text("{")

    assert list_batches(project) == []


@pytest.mark.parametrize("batch", ["", "..", "a/b", ".hidden", "a" * 101])
def test_a_batch_id_cannot_leave_staging(project: Project, batch: str):
    with pytest.raises(StagingError, match="cannot be the id of a batch"):
        begin_batch(project, batch, [])


def test_hard_table_names_are_staged_side_by_side(project: Project):
    names = ['we "ird', "a b", "select", "😀", "..", "a/b", "a\\b", "O'Hara", "UPPER", "x" * 300, "a-b", "a_b"]
    with closing(sqlite3.connect(project.root / "source.db")) as source, source:
        for index, name in enumerate(names):
            source.execute(f"CREATE TABLE {quote_identifier(name)} (n INTEGER)")
            source.execute(f"INSERT INTO {quote_identifier(name)} VALUES (?)", (index,))

    found = {}
    for name in names:
        files = staged_files(project, extract(project, name))
        with open_session(SETTINGS, extensions=()) as connection:
            found[name] = connection.execute("SELECT n FROM read_parquet(?)", [str(files[0])]).fetchall()

    assert found == {name: [(index,)] for index, name in enumerate(names)}
    assert sorted(m.table for m in list_manifests(project, "b1")) == sorted(names)
    assert all(path.parent == project.staging / "b1" for path in (project.staging / "b1").glob("*"))


def test_folder_names_differ_where_file_systems_do_not():
    folders = {folder_name(name).casefold() for name in ("people", "People", "PEOPLE", "people ")}

    assert len(folders) == 4


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
