"""The lake's files on S3: extracted to where they stay, registered as they are, removed when nothing needs them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from phasewise.cli.warehouse import diff, rollback, snapshots
from phasewise.errors import LakeError, PublishConflict, StagingError
from phasewise.lake.object_store import create_storage_secret, list_stored
from phasewise.lake.publications import open_reader, query_warehouse
from phasewise.lake.session import open_session, preload_extensions
from phasewise.lake.warehouse import prepare_lake
from phasewise.project.config import Project
from phasewise.publishing.maintenance import maintain_lake
from phasewise.publishing.publish import publish_batch
from phasewise.publishing.rollback import rollback_batch
from phasewise.publishing.staging_cleanup import remove_finished_staging
from phasewise.staging.batch import begin_batch
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import batch_folder, list_manifests, staged_files, staged_key_files
from phasewise.staging.partition_plan import plan_partitions
from phasewise.staging.replication import remove_shared
from phasewise.staging.source_snapshot import open_snapshot
from phasewise.testing.projects import (
    SAMPLE_SETTINGS,
    audit_sample,
    change_source,
    publish_sample,
    stage_batch,
    write_project,
)
from tests.integration.warehouses import fork, postgres_catalog, put_object, s3_bucket
from tests.servers import find_postgres

SETTINGS = SAMPLE_SETTINGS
AT_ONCE = SETTINGS.model_copy(update={"snapshot_retention_days": 0})


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "postgres_scanner", "httpfs", "ducklake"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog(request: pytest.FixtureRequest) -> Iterator[str]:
    """The line of phasewise.toml for each kind of catalog."""
    if request.param == "sqlite":
        yield ""
        return
    if why_not := find_postgres().why_not:
        pytest.skip(why_not)
    with postgres_catalog() as url:
        yield f'catalog = "{url}"'


@pytest.fixture
def project(tmp_path: Path, bucket: str, catalog: str) -> Project:
    return write_project(
        tmp_path,
        source="create table t (id integer primary key, n integer); insert into t values (1, 10), (2, 20);",
        toml=f'[warehouse]\n{catalog}\ndata = "{bucket}/{tmp_path.name}"\n',
        marts={"total": "select sum(n) as total from t"},
    )


def list_bucket(project: Project) -> set[str]:
    """Return the Parquet files of the project's lake on S3."""
    with open_session(SETTINGS, extensions=("httpfs",)) as connection:
        create_storage_secret(connection)
        return {str(file) for file in list_stored(connection, f"{project.data_path}**/*.parquet")}


def list_staged(project: Project, batch: str) -> set[str]:
    return {str(file) for manifest in list_manifests(project, batch) for file in staged_files(project, manifest)}


def read_total(project: Project) -> int:
    return query_warehouse(project, SETTINGS, "from total")[1][0][0]


def test_staged_files_are_published_where_they_were_written(project: Project):
    prepare_lake(project, SETTINGS)
    batch = stage_batch(project)
    staged = list_staged(project, batch)
    assert staged == list_bucket(project)
    assert not list(project.staging.rglob("*.parquet"))

    publish_sample(project, SETTINGS, batch)

    with open_reader(project, SETTINGS) as connection:
        registered = connection.execute("select data_file from ducklake_list_files('lake', 't')").fetchall()
    assert {name for (name,) in registered} == staged
    assert read_total(project) == 30


def test_staged_files_are_audited_before_anything_was_published(project: Project):
    batch = stage_batch(project)

    results = audit_sample(project, batch).results

    assert results
    assert all(result.passed for result in results)


def test_rolling_back_brings_the_rows_back_into_files_of_their_own(project: Project):
    first = stage_batch(project)
    publish_sample(project, SETTINGS, first)
    change_source(project.root, "update t set n = 0;")
    publish_sample(project, SETTINGS, stage_batch(project))

    rollback_batch(project, SETTINGS, first)
    # The files of the first batch go with its snapshot; those of the rollback must not be the same.
    maintain_lake(project, AT_ONCE, orphan_grace=timedelta(0))

    assert read_total(project) == 30


def test_cleanup_keeps_what_is_staged_and_deletes_what_nothing_names(project: Project):
    publish_sample(project, SETTINGS, stage_batch(project))
    given_up, open_batch = stage_batch(project), stage_batch(project)
    orphans = list_staged(project, given_up)
    remove_shared(project, batch_folder(project, given_up))

    done = maintain_lake(project, SETTINGS, orphan_grace=timedelta(0))

    assert done.deleted_files == len(orphans) == 1
    assert not orphans & list_bucket(project)
    assert list_staged(project, open_batch) <= list_bucket(project)
    publish_sample(project, SETTINGS, open_batch)
    assert read_total(project) == 30


def test_cleanup_keeps_the_parts_of_a_table_that_lacks_one(tmp_path: Path, bucket: str):
    project = write_project(
        tmp_path,
        source="create table t (id integer primary key, n integer); insert into t values (1, 10), (2, 20);",
        toml=f'[warehouse]\ndata = "{bucket}/{tmp_path.name}"\n[table.t]\npartition_rows = 1\n',
    )
    publish_sample(project, SETTINGS, stage_batch(project))
    begin_batch(project, "b1", ["t"])
    with open_snapshot(project, SETTINGS, "b1") as snapshot:
        parts = plan_partitions(project, SETTINGS, "b1", snapshot)["t"].list_names()
        extract_table(project, SETTINGS, batch="b1", table="t", partition=parts[0])
        maintain_lake(project, SETTINGS, orphan_grace=timedelta(0))
        extract_table(project, SETTINGS, batch="b1", table="t", partition=parts[1])

    publish_sample(project, SETTINGS, "b1")

    assert query_warehouse(project, SETTINGS, "select sum(n) from t")[1] == [(30,)]


def test_a_file_that_was_just_uploaded_may_still_get_its_manifest(project: Project):
    publish_sample(project, SETTINGS, stage_batch(project))
    batch = stage_batch(project)
    shutil.rmtree(batch_folder(project, batch) / "t")

    assert maintain_lake(project, SETTINGS).deleted_files == 0


def test_cleanup_of_staging_leaves_what_is_published(project: Project):
    batch = stage_batch(project)
    publish_sample(project, SETTINGS, batch)

    assert remove_finished_staging(project, SETTINGS, keep=()).removed == (batch,)
    maintain_lake(project, AT_ONCE, orphan_grace=timedelta(0))

    assert read_total(project) == 30


def test_files_of_expired_snapshots_are_deleted(project: Project):
    first = stage_batch(project)
    publish_sample(project, SETTINGS, first)
    publish_sample(project, SETTINGS, stage_batch(project))

    maintain_lake(project, AT_ONCE)

    assert not list_staged(project, first) & list_bucket(project)
    assert read_total(project) == 30


def test_a_reader_within_retention_is_never_broken_by_cleanup(project: Project):
    publish_sample(project, SETTINGS, stage_batch(project))

    with open_reader(project, SETTINGS) as connection:
        for number in range(2):
            change_source(project.root, f"update t set n = {number};")
            publish_sample(project, SETTINGS, stage_batch(project))
            maintain_lake(project, SETTINGS, orphan_grace=timedelta(0))

        assert connection.execute("select n from t order by id").fetchall() == [(10,), (20,)]


def test_a_publisher_killed_before_its_commit_leaves_the_batch_to_the_next(
    project: Project, monkeypatch: pytest.MonkeyPatch
):
    publish_sample(project, SETTINGS, stage_batch(project))
    change_source(project.root, "update t set n = 1;")
    batch = stage_batch(project)
    before = list_bucket(project)
    monkeypatch.setattr(
        "phasewise.publishing.publish.build_marts", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    )
    pid = fork(lambda: publish_sample(project, SETTINGS, batch))
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    monkeypatch.undo()

    maintain_lake(project, SETTINGS, orphan_grace=timedelta(0))

    assert list_bucket(project) == before
    assert read_total(project) == 30
    publish_sample(project, SETTINGS, batch)
    assert read_total(project) == 2


def test_a_staged_file_that_is_gone_is_not_published(project: Project):
    publish_sample(project, SETTINGS, stage_batch(project))
    audited = audit_sample(project, stage_batch(project))
    remove_shared(project, batch_folder(project, audited.batch.id))
    maintain_lake(project, SETTINGS, orphan_grace=timedelta(0))

    with pytest.raises(PublishConflict, match='"t" are not those that were audited: .* is missing.* Start a new batch'):
        publish_batch(project, SETTINGS, audited)


@pytest.mark.parametrize("kind", ["rows", "keys"])
def test_a_staged_file_with_other_bytes_is_not_published(tmp_path: Path, bucket: str, kind: str):
    project = write_project(
        tmp_path,
        source="create table t (id integer primary key, n integer, at integer); insert into t values (1, 1, 1);",
        toml=f'[warehouse]\ndata = "{bucket}/{tmp_path.name}"\n'
        '[table.t]\nmode = "merge"\ncursor = "at"\ndeletes = true\n',
    )
    publish_sample(project, SETTINGS, stage_batch(project))
    change_source(tmp_path, "update t set n = 7, at = 2")
    audited = audit_sample(project, stage_batch(project))
    [manifest] = audited.batch.manifests
    [file] = (staged_files if kind == "rows" else staged_key_files)(project, manifest)
    with open_session(SETTINGS, extensions=("httpfs",)) as connection:
        create_storage_secret(connection)
        content = connection.execute(f"select content from read_blob('{file}')").fetchone()[0]
    name = str(file).removeprefix("s3://lake/")

    put_object(name, content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    with pytest.raises(PublishConflict, match=f'table "t" .*{file.name} has changed.* Start a new batch'):
        publish_batch(project, SETTINGS, audited)
    put_object(name, content)
    publish_batch(project, SETTINGS, audited)

    assert query_warehouse(project, SETTINGS, "from t")[1] == [(1, 7, 2)]


def test_what_is_new_is_merged_and_what_was_deleted_is_found(tmp_path: Path, bucket: str, catalog: str):
    project = write_project(
        tmp_path,
        source="create table t (id integer primary key, n integer, at integer); "
        "insert into t values (1, 1, 1), (2, 2, 1);",
        toml=f'[warehouse]\n{catalog}\ndata = "{bucket}/{tmp_path.name}"\n'
        '[table.t]\nmode = "merge"\ncursor = "at"\ndeletes = true\n',
    )
    publish_sample(project, SETTINGS, stage_batch(project))
    change_source(project.root, "update t set n = 20, at = 2 where id = 2; delete from t where id = 1;")
    batch = stage_batch(project)
    assert list_manifests(project, batch)[0].key_files

    # The keys of the source are no file of the lake, and yet they are needed until the batch is published.
    maintain_lake(project, SETTINGS, orphan_grace=timedelta(0))
    publish_sample(project, SETTINGS, batch)
    remove_finished_staging(project, SETTINGS, keep=())
    maintain_lake(project, AT_ONCE, orphan_grace=timedelta(0))

    assert query_warehouse(project, SETTINGS, "from t")[1] == [(2, 20, 2)]


def test_rows_are_set_aside(tmp_path: Path, bucket: str, catalog: str):
    project = write_project(
        tmp_path,
        source="create table t (id integer, n integer); insert into t values (1, 1), (2, 2), (2, 3);",
        toml=f'[warehouse]\n{catalog}\ndata = "{bucket}/{tmp_path.name}"\n'
        '[table.t]\nkey = ["id"]\nquarantine = ["key"]\nquarantine_limit = "100%"\n',
    )
    batch = stage_batch(project)

    publish_sample(project, SETTINGS, batch)

    assert query_warehouse(project, SETTINGS, "select n from t order by n")[1] == [(1,)]
    assert query_warehouse(project, SETTINGS, "select n from _quarantine.t order by n")[1] == [(2,), (3,)]


def test_batches_are_listed_read_compared_and_gone_back_to(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PHASEWISE_PROJECT", str(tmp_path))
    project = write_project(
        tmp_path,
        source="create table t (id integer primary key, n integer); insert into t values (1, 1);"
        "create table grown (id integer primary key, n integer); insert into grown values (1, 1);",
        toml=f'[warehouse]\ndata = "{bucket}/{tmp_path.name}"\n'
        '[table.grown]\nmode = "append"\ncursor = "id"\nquarantine_limit = 9\n[[audit]]\nname = "positive"\n'
        'table = "grown"\nseverity = "quarantine"\nsql = "from grown where n < 0"\n',
    )
    ids = "select list(n order by n) from {}"
    for number in range(3):
        batch = stage_batch(project, batch=f"b{number}")
        publish_sample(project, SETTINGS, batch)
        change_source(
            tmp_path, f"update t set n = {number + 2}; insert into grown values ({number + 2}, {number + 2});"
        )
        change_source(tmp_path, f"insert into grown values ({number + 100}, -{number + 1});" if number else "")
    maintain_lake(project, SETTINGS, orphan_grace=timedelta(0))

    assert query_warehouse(project, SETTINGS, ids.format("grown"), at="b1")[1] == [([1, 2],)]
    assert query_warehouse(project, SETTINGS, ids.format("t"), at="b0")[1] == [([1],)]
    diff("b0", "b2")
    shown = [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    assert ["grown", "2", "0", "0"] in shown
    assert ["t", "0", "0", "1"] in shown
    rollback("b1")
    snapshots()
    assert ["rollback", "b1"] in [line.split()[3:5] for line in capsys.readouterr().out.splitlines()]
    assert query_warehouse(project, SETTINGS, ids.format("grown"))[1] == [([1, 2],)]
    assert query_warehouse(project, SETTINGS, ids.format("t"))[1] == [([2],)]


def test_storage_that_does_not_answer_is_named_without_the_credentials(
    project: Project, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")

    with pytest.raises(LakeError, match="s3://lake/.* cannot be written.*AWS_") as prepared:
        prepare_lake(project, SETTINGS)
    with pytest.raises(StagingError, match="s3://lake/.* cannot be written.*AWS_") as staged:
        stage_batch(project)

    chain = "".join(f"{caught.value} {caught.value.__cause__}" for caught in (prepared, staged))
    assert "secret-of-tests" not in chain
    assert "key-of-tests" not in chain
