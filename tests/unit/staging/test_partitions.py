"""A table that is split: staged apart, of one moment, and published whole or not at all."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

from phasewise.errors import AuditFailed, SourceError, SourceUnavailable, StagingError
from phasewise.lake.session import open_session, preload_extensions
from phasewise.lake.warehouse import attach_lake
from phasewise.project.config import Project, load_project
from phasewise.sources import list_project_tables, open_source
from phasewise.sources.sqlite import SqliteSource
from phasewise.staging import partition_plan
from phasewise.staging.batch import begin_batch, give_up_tables, list_batches
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import Manifest, list_manifests, staged_files
from phasewise.staging.partition_plan import plan_partitions
from phasewise.staging.partitions import SplitTable
from phasewise.staging.source_snapshot import forget_snapshot, open_snapshot
from phasewise.testing.projects import SAMPLE_SETTINGS, audit_sample, change_source, publish_sample, write_project

COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})"
#: Rowids with a gap, so that equal widths would not be equal rows; a key of texts in another order than their bytes.
SOURCE = f"""
create table big (id integer primary key, label text, day date);
{COUNT.format(rows=4000)} insert into big
  select case when i < 3000 then i else i * 1000 end, nullif('v' || i, 'v7'), date('2024-01-01', i || ' days') from n;
create table keyed (name text collate nocase, n integer, rowid text, primary key (name, n)) without rowid;
{COUNT.format(rows=3000)} insert into keyed select substr('aAbBzZ', 1 + i % 6, 1), i, null from n;
create table small (id integer primary key);
insert into small values (1), (2);
"""
TOML = "[table.big]\npartition_rows = 1000\n[table.keyed]\npartition_rows = 800\n"


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "ducklake"))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return write_project(tmp_path, source=SOURCE, toml=TOML)


def stage(project: Project, batch: str = "b1", *, skip: tuple[str, ...] = ()) -> dict[str, SplitTable]:
    """Stage *batch* as sub_etl does, all parts but those that *skip* names; it fails when it skips any."""
    plan = begin_batch(project, batch, list_project_tables(project, open_source(project, SAMPLE_SETTINGS)))
    try:
        with open_snapshot(project, SAMPLE_SETTINGS, batch) as snapshot:
            splits = plan_partitions(project, SAMPLE_SETTINGS, batch, snapshot)
            for table in plan.tables:
                names = splits[table].list_names() if table in splits else [None]
                for name in (name for name in names if name not in skip):
                    extract_table(project, SAMPLE_SETTINGS, batch=batch, table=table, partition=name)
            if skip:
                raise InterruptedError
    except InterruptedError:
        pass
    return splits


def audited(project: Project, batch: str = "b1") -> list[str]:
    """Return the messages of the audits that failed."""
    return [result.message for result in audit_sample(project, batch).results if not result.passed]


def staged_times(project: Project) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (project.staging / "b1").glob("*/manifest.json")}


def test_a_large_table_is_split_evenly_and_a_small_one_is_not(project: Project):
    splits = stage(project)

    assert sorted(splits) == ["big", "keyed"]
    for table, count in (("big", 4), ("keyed", 4)):
        rows = [m.rows for m in list_manifests(project, "b1") if m.table == table]
        assert len(rows) == count
        assert max(rows) <= 2 * min(rows)
        assert sum(rows) == splits[table].rows
    assert audited(project) == []


def test_a_split_table_is_published_as_one_and_equals_its_source(project: Project):
    stage(project)

    publish_sample(project, SAMPLE_SETTINGS, "b1")

    with open_session(SAMPLE_SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        connection.execute(f"ATTACH '{project.root / 'source.sqlite'}' AS source (TYPE sqlite, READ_ONLY)")
        for columns in ("id, label, day FROM {}.big", "name, n, rowid FROM {}.keyed", "id FROM {}.small"):
            ours, theirs = (f"SELECT {columns.format(name)}" for name in ("lake.main", "source.main"))
            for left, right in ((ours, theirs), (theirs, ours)):
                assert connection.execute(f"{left} EXCEPT ALL {right}").fetchall() == []


@pytest.mark.parametrize(("limit", "split"), [(1500, ["keyed"]), (0, [])])
def test_the_setting_is_for_every_table_that_says_nothing(tmp_path: Path, limit: int, split: list[str]):
    project = write_project(tmp_path, source=SOURCE, toml="[table.big]\npartition_rows = 0\n")
    settings = SAMPLE_SETTINGS.model_copy(update={"partition_rows": limit})
    begin_batch(project, "b1", ["big", "keyed", "small"])

    with open_snapshot(project, settings, "b1") as snapshot:
        splits = plan_partitions(project, settings, "b1", snapshot)

    assert list(splits) == split


def test_a_table_that_lacks_a_part_counts_as_not_staged(project: Project):
    stage(project, skip=("3/4",))

    assert {manifest.table for manifest in list_manifests(project, "b1")} == {"small"}
    [batch] = list_batches(project)
    assert batch.missing == ("big", "keyed")
    with pytest.raises(AuditFailed, match='"big"'):
        publish_sample(project, SAMPLE_SETTINGS, "b1")


def test_a_table_that_lacks_a_part_is_given_up_whole(project: Project):
    stage(project, "b0")
    publish_sample(project, SAMPLE_SETTINGS, "b0")
    change_source(project.root, "update big set label = 'new'; delete from small where id = 1;")
    stage(project, skip=("3/4",))
    give_up_tables(project, "b1", {"big": "a part failed", "keyed": "a part failed"})

    publish_sample(project, SAMPLE_SETTINGS, "b1")

    with open_session(SAMPLE_SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        counts = "SELECT count(*), count(*) FILTER (label = 'new') FROM lake.main.big"
        assert connection.execute(counts).fetchall() == [(4000, 0)]
        assert connection.execute("SELECT count(*) FROM lake.main.small").fetchall() == [(1,)]


def test_a_resume_at_the_same_moment_extracts_only_the_part_that_is_missing(project: Project):
    stage(project, skip=("3/4",))
    before = staged_times(project)
    change_source(project.root, "insert into big values (-5, 'late', null);")

    splits = stage(project)

    after = staged_times(project)
    assert {name: after[name] for name in before} == before
    assert len(after) - len(before) == 2
    assert splits["big"].rows == 4000
    assert audited(project) == []


def test_a_resume_at_another_moment_divides_the_table_anew(project: Project):
    stage(project, skip=("3/4",))
    before = staged_times(project)
    change_source(project.root, "delete from big where id = 1;")
    forget_snapshot(project, "b1")  # as when the source had to be mended

    splits = stage(project)

    assert {part.name for part in splits["big"].partitions} == {f"{n}/4 at moment 2" for n in range(1, 5)}
    assert sum(m.rows for m in list_manifests(project, "b1") if m.table == "big") == 3999
    assert staged_times(project).keys() & before.keys() == {"small"}
    assert audited(project) == []


def test_a_table_that_is_small_at_another_moment_is_staged_whole(project: Project):
    stage(project, skip=("3/4",))
    change_source(project.root, "delete from big where id > 10;")
    forget_snapshot(project, "b1")

    splits = stage(project)

    assert "big" not in splits
    assert [(m.partition, m.rows) for m in list_manifests(project, "b1") if m.table == "big"] == [(None, 10)]


def test_a_part_of_a_moment_that_is_gone_is_not_extracted(project: Project):
    stage(project, skip=("3/4",))

    with pytest.raises(StagingError, match="at a moment of the source that is gone"):
        extract_table(project, SAMPLE_SETTINGS, batch="b1", table="big", partition="3/4")


@pytest.mark.parametrize(
    ("table", "partition", "message"),
    [("big", None, "split into 4 partitions"), ("big", "5/4", "no partition"), ("small", "1/1", "no partition")],
)
def test_what_is_no_part_of_the_plan_is_refused(project: Project, table: str, partition: str | None, message: str):
    stage(project)

    with pytest.raises(StagingError, match=message):
        extract_table(project, SAMPLE_SETTINGS, batch="b1", table=table, partition=partition)


def test_parts_that_do_not_add_up_to_the_table_fail_its_audit(project: Project):
    splits = stage(project, skip=("3/4",))
    part = splits["big"].partitions[2]
    path = project.staging / "b1" / "partitions.json"
    # As when the rows of the table have moved to other places while its parts were read.
    path.write_text(path.read_text().replace(part.condition, f"{part.condition} AND rowid % 2 = 0"))

    stage(project)

    [message] = audited(project)
    assert message.startswith('Table "big" failed its audit')
    assert "4000 in the whole table" in message


def test_a_table_with_the_name_of_a_part_is_not_confused_with_it(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE + 'create table "big 2/4" (a integer);', toml=TOML)

    splits = stage(project)

    assert list(splits) == ["keyed"]
    assert len(list_manifests(project, "b1")) == 4 + 3


def test_a_damaged_plan_of_parts_is_named(project: Project):
    stage(project)
    (project.staging / "b1" / "partitions.json").write_text("[{]")

    with pytest.raises(StagingError, match=r"partitions\.json is damaged"):
        list_manifests(project, "b1")
    assert list_batches(project) == []


def test_a_table_that_cannot_be_split_is_staged_whole_and_says_why(tmp_path: Path):
    source = f"""
    create table big (name text primary key) without rowid;
    {COUNT.format(rows=3000)} insert into big select cast(x'ff' || i as text) from n;
    """
    toml = '[table.big]\npartition_rows = 1000\ncolumns = { name = "BLOB" }\n'
    project = write_project(tmp_path, source=source, toml=toml)

    splits = stage(project)

    [manifest] = list_manifests(project, "b1")
    assert (manifest.partition, manifest.rows) == (None, 3000)
    assert splits["big"].partitions == ()
    assert splits["big"].note == manifest.split_note
    assert manifest.split_note is not None
    assert "could not be split: Invalid Input Error: Invalid unicode" in manifest.split_note
    assert audited(project) == []


def test_an_error_that_is_not_of_splitting_fails_the_table_itself(tmp_path: Path):
    project = write_project(
        tmp_path, source=SOURCE, toml='[table.big]\npartition_rows = 500\nwhere = "no_column < 1"\n'
    )
    begin_batch(project, "b1", ["big"])

    with open_snapshot(project, SAMPLE_SETTINGS, "b1") as snapshot:
        splits = plan_partitions(project, SAMPLE_SETTINGS, "b1", snapshot)
        with pytest.raises(SourceError, match="no_column"):
            extract_table(project, SAMPLE_SETTINGS, batch="b1", table="big")

    assert "no_column" in (splits["big"].note or "")


def test_a_source_that_goes_away_is_no_reason_to_stage_its_tables_whole(
    project: Project, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: object) -> list[str]:
        raise duckdb.IOException("database is locked")

    monkeypatch.setattr(SqliteSource, "split", fail)
    begin_batch(project, "b1", ["big", "keyed", "small"])

    with (
        pytest.raises(SourceUnavailable, match="locked by another program"),
        open_snapshot(project, SAMPLE_SETTINGS, "b1") as snapshot,
    ):
        plan_partitions(project, SAMPLE_SETTINGS, "b1", snapshot)


def test_rows_of_a_condition_of_the_project_are_divided_too(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE, toml='[table.big]\npartition_rows = 500\nwhere = "id < 1001"\n')

    stage(project)

    rows = [m.rows for m in list_manifests(project, "b1") if m.table == "big"]
    assert rows == [500, 500]


def test_a_duckdb_file_is_divided_by_rowid_and_its_views_are_not(tmp_path: Path):
    with duckdb.connect(str(tmp_path / "a.duckdb"), config={"threads": 1}) as source:
        source.execute("CREATE TABLE t AS SELECT range AS a, 'x' || range AS b FROM range(40000)")
        source.execute("DELETE FROM t WHERE a < 20000 AND a % 10 <> 0")
        source.execute("CREATE VIEW v AS FROM t")
    (tmp_path / "phasewise.toml").write_text(
        '[project]\nname = "t"\n[source]\nurl = "duckdb:///a.duckdb"\n[tables]\ninclude = ["t", "v"]\n'
    )
    project = load_project(tmp_path)
    settings = SAMPLE_SETTINGS.model_copy(update={"partition_rows": 6000})
    begin_batch(project, "b1", ["t", "v"])
    with open_snapshot(project, settings, "b1") as snapshot:
        before = plan_partitions(project, settings, "b1", snapshot)
    with open_snapshot(project, settings, "b1") as snapshot:
        splits = plan_partitions(project, settings, "b1", snapshot)
        rows = [
            extract_table(project, settings, batch="b1", table="t", partition=part.name).rows
            for part in splits["t"].partitions
        ]

    assert list(splits) == ["t"]
    assert splits == before  # a file that nobody wrote to is at the same moment
    assert sum(rows) == splits["t"].rows == 22000
    assert max(rows) <= 2 * min(rows)


def stage_files(tmp_path: Path) -> list[Manifest]:
    """Stage the table ``t`` of the folder ``files`` in parts of about 10,000 rows, and compare it with the files."""
    (tmp_path / "phasewise.toml").write_text('[project]\nname = "t"\n[source]\nurl = "file:///files"\n')
    project = load_project(tmp_path)
    settings = SAMPLE_SETTINGS.model_copy(update={"partition_rows": 10_000})
    begin_batch(project, "b1", ["t"])
    with open_snapshot(project, settings, "b1") as snapshot:
        splits = plan_partitions(project, settings, "b1", snapshot)
        for name in splits["t"].list_names() if splits else [None]:
            extract_table(project, settings, batch="b1", table="t", partition=name)
    parts = list_manifests(project, "b1")
    staged = [str(path) for part in parts for path in staged_files(project, part)]
    with duckdb.connect() as connection:
        select = "SELECT count(*), sum(id), count(late), sum(late) FROM read_parquet(?, union_by_name = true)"
        files = [str(path).replace("[", "[[]") for path in (tmp_path / "files").rglob("*.parquet")]
        assert connection.execute(select, [staged]).fetchall() == connection.execute(select, [files]).fetchall()
    return parts


def test_a_folder_of_parquet_files_is_divided_by_files(tmp_path: Path):
    (tmp_path / "files" / "t").mkdir(parents=True)
    with duckdb.connect() as connection:
        for number in range(20):
            rows, late = 1000 + number * 200, ", range / 4 AS late" if number > 10 else ", 1::TINYINT AS late"
            path = tmp_path / "files" / "t" / f"[{number:03}] it''s.parquet"
            connection.execute(f"COPY (SELECT range AS id {late if number else ''} FROM range({rows})) TO '{path}'")

    parts = stage_files(tmp_path)

    rows = [part.rows for part in parts]
    assert len(rows) == 6
    assert max(rows) <= 2 * min(rows)
    assert {tuple(column.type for column in part.columns) for part in parts} == {("BIGINT", "DOUBLE")}


def test_one_parquet_file_is_divided_by_its_rows(tmp_path: Path):
    (tmp_path / "files").mkdir()
    with duckdb.connect() as connection:
        select = "SELECT range AS id, 0.5::DOUBLE AS late FROM range(45000)"
        connection.execute(f"COPY ({select}) TO '{tmp_path}/files/t.parquet' (ROW_GROUP_SIZE 5000)")

    rows = [part.rows for part in stage_files(tmp_path)]

    assert len(rows) == 5
    assert max(rows) <= 2 * min(rows)


def test_a_parquet_file_with_a_column_of_the_name_that_divides_it_is_staged_whole(tmp_path: Path):
    (tmp_path / "files").mkdir()
    with duckdb.connect() as connection:
        select = "SELECT range AS id, 1 AS late, 7 AS FILE_row_number FROM range(20000)"
        connection.execute(f"COPY ({select}) TO '{tmp_path}/files/t.parquet'")

    assert [part.rows for part in stage_files(tmp_path)] == [20000]


def test_parts_of_a_first_load_have_one_cursor_and_the_next_batch_is_read_from_it(tmp_path: Path):
    source = "".join(f"create table {name} (id integer primary key, at integer);" for name in ("a", "b"))
    source += "".join(f"insert into {name} values (1, 30), (2, 20), (3, 10), (4, 5);" for name in ("a", "b"))
    options = 'mode = "merge"\ncursor = "at"\npartition_rows = 2\n'
    project = write_project(tmp_path, source=source, toml=f"[table.a]\n{options}[table.b]\n{options}")

    first = stage(project)
    publish_sample(project, SAMPLE_SETTINGS, "b1")
    change_source(tmp_path, "update a set at = 40 where id = 4")
    second = stage(project, "b2")
    published = publish_sample(project, SAMPLE_SETTINGS, "b2")

    assert sorted(first) == ["a", "b"]
    assert second == {}
    assert [part.load.since for part in list_manifests(project, "b2")] == ["30", "30"]
    assert [(table.rows, table.changed) for table in published.tables] == [(4, 1), (4, 0)]
    assert [state.mark for state in published.states] == ["40", "30"]


def test_the_source_is_opened_once_to_look_at_all_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ("a", "b", "c")
    source = "".join(f"create table {name} (id integer primary key, at integer);" for name in names)
    toml = "".join(f'[table.{name}]\nmode = "merge"\ncursor = "at"\npartition_rows = 0\n' for name in names)
    project = write_project(tmp_path, source=source, toml=toml)
    begin_batch(project, "b1", names)
    opened: list[str] = []
    monkeypatch.setattr(partition_plan, "open_source", lambda *args: opened.append("source") or open_source(*args))

    plan_partitions(project, SAMPLE_SETTINGS, "b1", None)

    assert opened == ["source"]
