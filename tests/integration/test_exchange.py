"""Machines that share a catalog in PostgreSQL and a bucket on S3, and no folder, work on one batch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from phasewise.lake.publications import query_warehouse
from phasewise.lake.session import preload_extensions
from phasewise.project.config import Project, load_project
from phasewise.publishing.maintenance import maintain_lake
from phasewise.publishing.staging_cleanup import remove_finished_staging
from phasewise.staging import replication
from phasewise.staging.batch import begin_batch, give_up_tables, list_batches, read_batch, read_plan
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import list_manifests
from phasewise.staging.replication import _read, fetch_staging
from phasewise.staging.source_snapshot import open_snapshot
from phasewise.testing.projects import SAMPLE_SETTINGS, publish_sample, write_project
from tests.integration.warehouses import postgres_catalog, s3_bucket
from tests.servers import find_postgres
from tests.staged import read_manifest

SETTINGS = SAMPLE_SETTINGS

pytestmark = find_postgres().needed()


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "postgres_scanner", "httpfs", "ducklake"))


def stage(project: Project, batch: str) -> None:
    begin_batch(project, batch, ["a", "b"])
    for table in ("a", "b"):
        extract_table(project, SETTINGS, batch=batch, table=table)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Project, Project]]:
    """The project on two machines: the same files in two folders, and nothing else in common but the two servers."""
    with postgres_catalog() as url, s3_bucket() as data:
        (tmp_path / "one").mkdir()
        one = write_project(
            tmp_path / "one",
            source="create table a (id integer primary key); insert into a values (1), (2);"
            "create table b (id integer primary key); insert into b values (3);",
            toml=f'[warehouse]\ncatalog = "{url}"\ndata = "{data}"\n',
            marts={"total": "select sum(id) as total from (from a union all from b)"},
        )
        shutil.copytree(one.root, tmp_path / "two")
        yield one, load_project(tmp_path / "two")


def test_two_machines_stage_one_batch_and_either_publishes_it(machines: tuple[Project, Project]):
    one, two = machines
    begin_batch(one, "b1", ["a", "b"])
    extract_table(one, SETTINGS, batch="b1", table="a")
    extract_table(two, SETTINGS, batch="b1", table="b")

    (batch,) = list_batches(one)
    assert (batch.tables, batch.missing) == (("a", "b"), ())
    publish_sample(two, SETTINGS, "b1")

    assert list_batches(one)[0].is_published
    assert query_warehouse(one, SETTINGS, "from total")[1] == [(6,)]


def test_a_batch_that_begins_on_two_machines_has_one_plan(machines: tuple[Project, Project]):
    one, two = machines

    first = begin_batch(one, "b1", ["a"])

    assert begin_batch(two, "b1", ["a", "b"]) == first


def test_a_table_that_another_machine_staged_is_not_extracted_again(machines: tuple[Project, Project]):
    one, two = machines
    first = extract_table(one, SETTINGS, batch="b1", table="a")

    assert extract_table(two, SETTINGS, batch="b1", table="a") == first
    assert read_manifest(two, "b1", "a") == first


def test_a_moment_is_known_on_all_machines_and_gone_on_all(machines: tuple[Project, Project]):
    one, two = machines
    begin_batch(one, "b1", ["a", "b"])

    with open_snapshot(one, SETTINGS, "b1"):
        begin_batch(two, "b1", ["a", "b"])
        assert (two.staging / "b1" / "snapshot.json").exists()

    list_manifests(two, "b1")
    assert not (two.staging / "b1" / "snapshot.json").exists()


def test_tables_that_were_given_up_are_given_up_on_all_machines(machines: tuple[Project, Project]):
    one, two = machines
    begin_batch(one, "b1", ["a", "b"])
    extract_table(two, SETTINGS, batch="b1", table="a")

    give_up_tables(one, "b1", {"b": "it's gone"})

    assert list_batches(two)[0].is_complete
    assert read_batch(two, "b1").given_up == {"b": "it's gone"}


def test_a_cleanup_on_one_machine_is_one_on_all(machines: tuple[Project, Project]):
    one, two = machines
    stage(one, "b1")
    publish_sample(two, SETTINGS, "b1")

    assert remove_finished_staging(two, SETTINGS, keep=()).removed == ("b1",)

    assert list_batches(one) == []
    assert not (one.staging / "b1").exists()


def test_what_another_process_writes_meanwhile_stays(
    machines: tuple[Project, Project], monkeypatch: pytest.MonkeyPatch
):
    one, _ = machines
    begin_batch(one, "b1", ["a", "b"])
    ask = _read

    def ask_and_be_late(*args: Any) -> dict[Path, str]:
        stored = ask(*args)
        monkeypatch.undo()
        extract_table(one, SETTINGS, batch="b1", table="a")
        begin_batch(one, "b2", ["a"])
        return stored

    monkeypatch.setattr(replication, "_read", ask_and_be_late)
    fetch_staging(one)

    assert (one.staging / "b1" / "a" / "manifest.json").exists()
    assert read_plan(one, "b2") is not None


def test_files_that_another_machine_staged_are_no_orphans(machines: tuple[Project, Project]):
    one, two = machines
    stage(one, "b1")
    publish_sample(one, SETTINGS, "b1")
    stage(one, "b2")

    assert maintain_lake(two, SETTINGS, orphan_grace=timedelta(0)).deleted_files == 0

    publish_sample(two, SETTINGS, "b2")
    assert query_warehouse(two, SETTINGS, "from total")[1] == [(6,)]
