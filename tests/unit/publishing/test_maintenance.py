"""Cleanup: what is finished goes, what runs or can be resumed stays, and no reader within retention is broken."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from phasewise.lake.publications import list_publications, open_reader
from phasewise.lake.session import open_session, preload_extensions
from phasewise.lake.warehouse import Snapshot, attach_lake
from phasewise.project.config import Project
from phasewise.publishing import staging_cleanup
from phasewise.publishing.maintenance import list_expired, maintain_lake
from phasewise.publishing.staging_cleanup import remove_finished_staging
from phasewise.staging.batch import find_publishable_batch
from phasewise.staging.manifest import batch_folder, staged_files
from phasewise.testing.projects import SAMPLE_SETTINGS, change_source, publish_sample, stage_batch, write_project
from tests.staged import read_manifest

SETTINGS = SAMPLE_SETTINGS
NO_RETENTION = SETTINGS.model_copy(update={"snapshot_retention_days": 0, "batch_retention_days": 0})
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "ducklake"))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    source = "create table people (id integer primary key); insert into people values (1), (2)"
    return write_project(tmp_path, source=source, marts={"n": "select count(*) as n from people"})


def age(project: Project, batch: str, *, days: float) -> None:
    """Let the batch have begun *days* ago."""
    path = batch_folder(project, batch) / "batch.json"
    plan = json.loads(path.read_text())
    plan["created_at"] = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    path.write_text(json.dumps(plan))


def parquet_files(project: Project) -> set[Path]:
    return set((project.warehouse / "data").rglob("*.parquet"))


def count(project: Project) -> int:
    with open_reader(project, SETTINGS) as connection:
        return connection.execute("select count(*) from people").fetchone()[0]


def test_published_staging_goes_and_readers_do_not_notice(project: Project):
    batch = stage_batch(project)
    publish_sample(project, SETTINGS, batch)

    done = remove_finished_staging(project, SETTINGS, keep=set())

    assert (done.removed, done.kept) == ((batch,), ())
    assert done.freed_bytes > 0
    assert list(project.staging.iterdir()) == []
    assert count(project) == 2


def test_a_batch_that_can_be_resumed_stays(project: Project):
    batch = stage_batch(project)
    age(project, batch, days=6.9)

    done = remove_finished_staging(project, SETTINGS, keep=set())

    assert (done.removed, done.kept, done.freed_bytes) == ((), (batch,), 0)
    assert find_publishable_batch(project) == batch


def test_a_batch_past_retention_is_given_up(project: Project):
    batch = stage_batch(project)
    age(project, batch, days=7.1)

    assert remove_finished_staging(project, SETTINGS, keep=set()).removed == (batch,)


def test_the_running_batch_stays_whatever_its_state(project: Project):
    published, old = stage_batch(project), stage_batch(project)
    publish_sample(project, SETTINGS, published)
    age(project, old, days=100)

    done = remove_finished_staging(project, NO_RETENTION, keep={published, old})

    assert (done.removed, set(done.kept)) == ((), {published, old})


def test_a_removal_that_was_killed_is_finished_by_the_next(project: Project):
    batch = stage_batch(project)
    batch_folder(project, batch).rename(project.staging / f".removed-{batch}")

    done = remove_finished_staging(project, SETTINGS, keep=set())

    assert done.freed_bytes > 0
    assert list(project.staging.iterdir()) == []


def test_a_batch_that_another_process_removes_meanwhile_counts_as_removed(
    project: Project, monkeypatch: pytest.MonkeyPatch
):
    batch = stage_batch(project)
    publish_sample(project, SETTINGS, batch)
    monkeypatch.setattr(staging_cleanup, "forget_batch", lambda project, name: shutil.rmtree(project.staging / name))

    assert remove_finished_staging(project, SETTINGS, keep=set()).removed == (batch,)


def test_staging_that_never_was_has_nothing_to_remove(project: Project):
    done = remove_finished_staging(project, SETTINGS, keep=set())

    assert (done.removed, done.kept, done.freed_bytes) == ((), (), 0)


def test_a_warehouse_that_never_was_has_nothing_to_maintain(project: Project):
    done = maintain_lake(project, SETTINGS)

    assert (done.expired_snapshots, done.deleted_files) == (0, 0)
    assert not project.warehouse.exists()


def test_maintenance_within_retention_changes_nothing(project: Project):
    for _ in range(3):
        publish_sample(project, SETTINGS, stage_batch(project))
    files = parquet_files(project)

    done = maintain_lake(project, SETTINGS)

    assert (done.expired_snapshots, done.merged_files, done.deleted_files, done.freed_bytes) == (0, 0, 0, 0)
    assert parquet_files(project) == files


def test_past_retention_only_the_published_state_is_left(project: Project):
    for rows in range(3):
        change_source(project.root, f"insert into people values ({rows + 10})")
        last = stage_batch(project)
        publish_sample(project, SETTINGS, last)
    before = parquet_files(project)

    done = maintain_lake(project, NO_RETENTION)

    assert done.expired_snapshots == 3
    assert done.deleted_files == len(before) - len(parquet_files(project)) == 2
    assert done.freed_bytes > 0
    assert count(project) == 5
    with open_reader(project, SETTINGS) as connection:
        assert [publication.batch for publication in list_publications(connection)] == [last]
    assert publish_sample(project, SETTINGS, last).was_published


def test_deleting_files_of_the_lake_leaves_staging_whole(project: Project):
    kept = stage_batch(project)
    publish_sample(project, SETTINGS, kept)
    publish_sample(project, SETTINGS, stage_batch(project))

    assert maintain_lake(project, NO_RETENTION).deleted_files > 0

    manifest = read_manifest(project, kept, "people")
    assert all(file.is_file() for file in staged_files(project, manifest))


def test_files_of_a_failed_publish_go_at_once_and_those_of_others_after_a_grace(project: Project):
    publish_sample(project, SETTINGS, stage_batch(project))
    known = parquet_files(project)
    folder = next(iter(known)).parent
    ours, foreign, old = (folder / name for name in ("phasewise-1.parquet", "ducklake-2.parquet", "ducklake-3.parquet"))
    for path in (ours, foreign, old):
        path.write_bytes(b"x" * 1000)
    os.utime(old, (0, 0))

    done = maintain_lake(project, SETTINGS)

    assert (done.deleted_files, done.freed_bytes) == (2, 2000)
    assert parquet_files(project) == known | {foreign}


def test_small_files_of_others_are_merged_and_their_readers_can_finish(project: Project):
    publish_sample(project, SETTINGS, stage_batch(project))
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project)
        for start in range(4):
            connection.execute(f"insert into lake.main.people select range + {start} * 100 from range(10, 100)")
    with open_reader(project, SETTINGS) as reader:
        merged = maintain_lake(project, SETTINGS).merged_files
        again = maintain_lake(project, SETTINGS)

        assert merged == 1
        assert (again.merged_files, again.deleted_files) == (0, 0)
        assert reader.execute("select count(*) from people").fetchone() == (362,)
    assert count(project) == 362


def snapshot(number: int, *, hours_ago: float, batch: str | None = None) -> Snapshot:
    return Snapshot(id=number, at=NOW - timedelta(hours=hours_ago), batch=batch)


def test_a_snapshot_expires_by_when_it_was_replaced():
    snapshots = [
        snapshot(0, hours_ago=900),
        snapshot(1, hours_ago=800, batch="a"),
        snapshot(2, hours_ago=700, batch="b"),
        snapshot(3, hours_ago=1, batch="c"),
    ]

    # 2 is a month old, but was what everybody read until an hour ago.
    assert list_expired(snapshots, before=NOW - timedelta(hours=24)) == [0, 1]


def test_the_newest_batch_never_expires_under_later_maintenance():
    snapshots = [
        snapshot(1, hours_ago=900, batch="a"),
        snapshot(2, hours_ago=800, batch="b"),
        snapshot(3, hours_ago=700),
        snapshot(4, hours_ago=600),
    ]

    assert list_expired(snapshots, before=NOW) == [1, 3]
