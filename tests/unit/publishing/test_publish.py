"""Publish: one batch is one snapshot, twice is once, and whatever fails leaves the warehouse as it was."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phasewise.errors import AuditFailed, LakeError, NothingStaged, ProjectError, PublishConflict, WarehouseBusy
from phasewise.lake.publications import TableDiff, diff_batches, list_publications, open_reader
from phasewise.lake.session import open_session, preload_extensions
from phasewise.lake.warehouse import Snapshot, attach_lake, list_snapshots, lock_lake
from phasewise.project.config import Project
from phasewise.publishing.maintenance import maintain_lake
from phasewise.publishing.publish import publish_batch, renew_marts
from phasewise.publishing.rollback import rollback_batch
from phasewise.staging.batch import begin_batch, give_up_tables, list_batches
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import batch_folder, digest_path, staged_files
from phasewise.testing.projects import (
    SAMPLE_SETTINGS,
    audit_sample,
    change_source,
    publish_sample,
    stage_batch,
    write_project,
)
from tests.staged import read_manifest

SETTINGS = SAMPLE_SETTINGS

SOURCE = """
create table people (id integer primary key, name text);
insert into people values (1, 'Babe'), (2, 'Hank');
create table hits (person integer, n integer);
insert into hits values (1, 2873), (2, 3771);
"""
MARTS = {
    "best": "select name, n from all_hits order by n desc limit 1",
    "all_hits": "from hits join people on person = id",
}


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "ducklake"))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return write_project(tmp_path, source=SOURCE, marts=MARTS)


def publish(project: Project, batch: str | None = None) -> str:
    batch = stage_batch(project, batch=batch)
    publish_sample(project, SETTINGS, batch)
    return batch


def query(project: Project, sql: str, *, at: str | None = None) -> list[tuple[Any, ...]]:
    with open_reader(project, SETTINGS, at=at) as connection:
        return connection.execute(sql).fetchall()


def snapshots(project: Project) -> list[Snapshot]:
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        return list_snapshots(connection)


def files(project: Project) -> set[str]:
    return {str(path.relative_to(project.warehouse)) for path in (project.warehouse / "data").rglob("*.parquet")}


def test_tables_and_marts_are_one_snapshot_with_the_batch(project: Project):
    batch = stage_batch(project)

    publication = publish_sample(project, SETTINGS, batch)

    assert [(snapshot.id, snapshot.batch) for snapshot in snapshots(project)] == [(0, None), (1, batch)]
    assert query(project, "from people order by id") == [(1, "Babe"), (2, "Hank")]
    assert query(project, "from best") == [("Hank", 3771)]
    assert query(project, "from marts.best") == [("Hank", 3771)]
    assert (publication.batch, publication.snapshot, publication.was_published) == (batch, 1, False)
    assert [(table.name, table.rows, table.key) for table in publication.tables] == [
        ("hits", 2, ()),
        ("people", 2, ("id",)),
    ]
    assert publication.marts == ("all_hits", "best")
    assert [entry.is_published for entry in list_batches(project)] == [True]


def test_a_second_batch_replaces_rows_columns_and_types(project: Project):
    first = publish(project)
    change_source(
        project.root,
        "drop table hits; create table hits (person text, year integer, n real);"
        "insert into hits values ('1', 1920, 1.5)",
    )
    (project.root / "marts" / "best.sql").write_text("select 1 as one")
    (project.root / "marts" / "all_hits.sql").unlink()
    project = write_project(project.root, source="")

    second = publish(project)

    assert [snapshot.batch for snapshot in snapshots(project)] == [None, first, second]
    assert query(project, "from hits") == [("1", 1920, 1.5)]
    assert query(project, "select table_name from duckdb_tables() where schema_name = 'marts'") == [("best",)]


def test_publishing_twice_changes_nothing(project: Project):
    batch = stage_batch(project)
    first = publish_sample(project, SETTINGS, batch)
    before = files(project)

    again = publish_sample(project, SETTINGS, batch)

    assert again.was_published
    assert (again.snapshot, again.tables, again.at) == (first.snapshot, first.tables, first.at)
    assert len(snapshots(project)) == 2
    assert files(project) == before
    assert query(project, "select count(*) from hits") == [(2,)]


def test_a_batch_is_known_as_published_when_its_marker_and_its_staging_are_gone(project: Project):
    batch = stage_batch(project)
    publish_sample(project, SETTINGS, batch)
    (batch_folder(project, batch) / "published.json").unlink()

    assert publish_sample(project, SETTINGS, batch).was_published
    assert list_batches(project)[0].is_published


def test_a_batch_without_staging_says_so(project: Project):
    with pytest.raises(NothingStaged, match='Nothing is staged for the batch "b"'):
        publish_sample(project, SETTINGS, "b")


def test_a_batch_never_takes_the_warehouse_back_in_time(project: Project):
    old = stage_batch(project)
    publish(project)

    with pytest.raises(PublishConflict, match=rf'The batch "{old}" began .*, before the batch'):
        publish_sample(project, SETTINGS, old)

    assert len(snapshots(project)) == 2


def test_tables_that_a_batch_does_not_have_stay(project: Project):
    publish(project)
    change_source(project.root, "delete from hits")
    extract_table(project, SETTINGS, batch="b", table="hits")

    publish_sample(project, SETTINGS, "b")

    assert query(project, "select count(*) from hits") == [(0,)]
    assert query(project, "select count(*) from people") == [(2,)]


def test_a_mart_that_fails_publishes_nothing(project: Project):
    first = publish(project)
    change_source(project.root, "delete from people")
    broken = write_project(project.root, source="", marts={"zzz": "select error('broken') from hits"})

    with pytest.raises(ProjectError, match=r"marts/zzz\.sql failed: .*broken"):
        publish(broken)

    assert [snapshot.batch for snapshot in snapshots(project)] == [None, first]
    assert query(project, "select count(*) from people") == [(2,)]


def test_staged_files_that_were_tampered_with_are_not_published(project: Project):
    publish(project)
    before = snapshots(project)
    batch = stage_batch(project)
    manifest = read_manifest(project, batch, "hits")
    with staged_files(project, manifest)[0].open("ab") as file:
        file.write(b"x")

    with pytest.raises(AuditFailed, match='The batch failed its audit: table "hits" is not staged'):
        publish_sample(project, SETTINGS, batch)

    assert snapshots(project) == before


def test_a_type_that_the_lake_lacks_fails_with_the_table_and_changes_nothing(project: Project):
    batch = stage_batch(project)
    manifest = read_manifest(project, batch, "hits")
    file = staged_files(project, manifest)[0]
    with open_session(SETTINGS, extensions=()) as connection:
        connection.execute(f"copy (select timetz '12:00:00+02' as t) to '{file}'")
    path = file.with_name("manifest.json")
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"size_bytes": file.stat().st_size, "digests": [digest_path(file)]}))

    with pytest.raises(
        LakeError, match='Table "hits" cannot be published: .*Expected TIME WITH TIME ZONE.*The warehouse is unchanged'
    ):
        publish_batch(project, SETTINGS, replace(audit_sample(project, batch), results=()))

    assert len(snapshots(project)) == 1


def test_the_warehouse_can_be_moved(project: Project):
    publish(project)
    moved = project.model_copy(update={"warehouse": project.root / "elsewhere"})
    project.warehouse.rename(moved.warehouse)

    assert query(moved, "select count(*) from people") == [(2,)]


@pytest.mark.parametrize("name", ["year=2024", "a[b]*?c", 'it\'s "so"', "ünï 🐘"])
def test_folders_with_odd_names_hold_a_warehouse(tmp_path: Path, name: str):
    root = tmp_path / name
    root.mkdir()
    project = write_project(root, source=SOURCE)

    publish(project)

    assert query(project, "from people order by id") == [(1, "Babe"), (2, "Hank")]


def test_odd_table_names_are_published(tmp_path: Path):
    names = ["select", 'a "b" c', "../x", "it's; drop", "🐘", "x/y\\z", "Ünïcode", "main", "  "]
    quoted = [name.replace('"', '""') for name in names]
    source = "".join(f'create table "{name}" (a integer); insert into "{name}" values (1);' for name in quoted)
    project = write_project(tmp_path, source=source)

    publish(project)
    publish(project)

    for name in quoted:
        assert query(project, f'from lake.main."{name}"') == [(1,)]


def test_a_failed_table_can_be_left_as_it_was(project: Project):
    publish(project)
    change_source(project.root, "delete from hits; delete from people")
    begin_batch(project, "b", ["hits", "people"])
    extract_table(project, SETTINGS, batch="b", table="hits")

    give_up_tables(project, "b", {"people": "it failed"})

    publish_sample(project, SETTINGS, "b")

    assert query(project, "select count(*) from hits") == [(0,)]
    assert query(project, "select count(*) from people") == [(2,)]


def test_staging_on_another_file_system_is_copied(project: Project, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    batch = stage_batch(project)
    monkeypatch.setattr(os, "link", refuse)

    publish_sample(project, SETTINGS, batch)

    assert query(project, "select count(*) from people") == [(2,)]


def test_a_full_disk_is_named(project: Project, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    batch = stage_batch(project)
    monkeypatch.setattr(os, "link", refuse)

    with pytest.raises(LakeError, match="cannot be written: No space left on device. It is unchanged"):
        publish_sample(project, SETTINGS, batch)


def test_one_writer_waits_for_the_other(project: Project):
    batch = stage_batch(project)
    impatient = SETTINGS.model_copy(update={"lock_timeout": 0})
    with lock_lake(project, timeout=0):
        with pytest.raises(WarehouseBusy, match=f"Process {os.getpid()} "):
            publish_sample(project, impatient, batch)
        patient = threading.Thread(target=publish_sample, args=(project, SETTINGS, batch))
        patient.start()
    patient.join(timeout=20)

    assert query(project, "select count(*) from people") == [(2,)]


def test_a_reader_sees_one_snapshot_for_as_long_as_it_reads(project: Project):
    publish(project)
    with open_reader(project, SETTINGS) as connection:
        change_source(project.root, "delete from people; delete from hits")
        publish(project)

        assert connection.execute("select count(*) from people").fetchone() == (2,)
        assert connection.execute("from best").fetchall() == [("Hank", 3771)]


def test_a_reader_can_look_at_any_batch(project: Project):
    first = publish(project)
    change_source(project.root, "delete from hits where person = 2")
    second = publish(project)

    assert query(project, "from best", at=first) == [("Hank", 3771)]
    assert query(project, "from best", at=second) == [("Babe", 2873)]
    with pytest.raises(PublishConflict, match=rf'no snapshot of the batch "nope"\. It has: {second}, {first}\.'):
        query(project, "select 1", at="nope")


def test_rollback_is_a_snapshot_like_any_other(project: Project):
    first = publish(project)
    change_source(project.root, "delete from hits where person = 2; create table more (a integer)")
    second = publish(project)

    publication = rollback_batch(project, SETTINGS, first)

    assert (publication.batch, publication.kind) == (first, "rollback")
    assert [snapshot.batch for snapshot in snapshots(project)] == [None, first, second, first]
    assert query(project, "select table_name from duckdb_tables() where schema_name = 'main' order by 1") == [
        ("hits",),
        ("people",),
    ]
    assert query(project, "from best") == [("Hank", 3771)]
    assert query(project, "from best", at=second) == [("Babe", 2873)]


def test_rollback_links_published_files_and_outlives_the_snapshot_that_it_went_back_to(project: Project):
    first = publish(project)
    publish(project)
    before = files(project)

    rollback_batch(project, SETTINGS, first)
    new = files(project) - before
    maintain_lake(project, SETTINGS.model_copy(update={"snapshot_retention_days": 0}))

    assert len([name for name in new if Path(name).name.startswith("phasewise-")]) == 2
    assert len(snapshots(project)) == 1
    assert query(project, "from people order by id") == [(1, "Babe"), (2, "Hank")]
    assert query(project, "from best") == [("Hank", 3771)]


def test_rollback_restores_what_others_changed_in_the_lake(project: Project):
    first = publish(project)
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project)
        connection.execute("delete from lake.main.people where id = 1")
        connection.execute("insert into lake.main.hits values (7, 7)")
    extract_table(project, SETTINGS, batch="b", table="hits")
    changed = publish_sample(project, SETTINGS, "b").batch
    publish_sample(project, SETTINGS, stage_batch(project))

    rollback_batch(project, SETTINGS, changed)
    assert query(project, "from people") == [(2, "Hank")]

    rollback_batch(project, SETTINGS, first)
    assert query(project, "from people order by id") == [(1, "Babe"), (2, "Hank")]


def test_after_a_rollback_the_next_batch_is_published_as_ever(project: Project):
    first = publish(project)
    change_source(project.root, "delete from hits where person = 2")
    second = publish(project)
    rollback_batch(project, SETTINGS, first)

    assert publish_sample(project, SETTINGS, second).was_published
    publish(project)

    assert query(project, "from best") == [("Babe", 2873)]


def test_marts_are_built_again_without_a_new_batch(project: Project):
    batch = publish(project)
    changed = write_project(project.root, source="", marts={"best": "select 'new' as name"})

    publication = renew_marts(changed, SETTINGS)

    assert (publication.batch, publication.kind, publication.snapshot) == (batch, "marts", 2)
    assert query(changed, "from best") == [("new",)]
    assert query(changed, "select count(*) from people") == [(2,)]


def test_there_are_no_marts_to_renew_before_the_first_batch(project: Project):
    with pytest.raises(LakeError, match="Nothing was published"):
        renew_marts(project, SETTINGS)


def test_a_difference_counts_rows_by_their_key(project: Project):
    first = publish(project)
    change_source(
        project.root,
        "update people set name = 'Henry' where id = 2; insert into people values (3, 'Willie'), (4, 'Lou');"
        "delete from people where id = 1; update hits set n = 0 where person = 1; create table more (a integer);"
        "insert into more values (1); alter table hits add column year integer",
    )
    second = publish(project)

    assert diff_batches(project, SETTINGS, first, second) == [
        TableDiff(name="hits", added=1, removed=1, changed=0, added_columns=("year",)),
        TableDiff(name="more", added=1, removed=0, changed=0, added_columns=("a",)),
        TableDiff(name="people", added=2, removed=1, changed=1),
    ]
    assert all(diff.is_same for diff in diff_batches(project, SETTINGS, second, second))


def test_snapshots_of_others_are_no_publications(project: Project):
    batch = publish(project)
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project)
        connection.execute("insert into lake.main.people values (9, 'Nolan')")
        connection.execute("begin")
        connection.execute("call lake.set_commit_message('me', 'hello', extra_info => 'not json')")
        connection.execute("insert into lake.main.people values (10, 'Cy')")
        connection.execute("commit")

        assert [publication.batch for publication in list_publications(connection)] == [batch]
