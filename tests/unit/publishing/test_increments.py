"""Incremental tables: append, merge and history hold what their rules say, whatever happened between two batches."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phasewise.errors import AuditFailed, ProjectError, PublishConflict, SchemaDrift
from phasewise.lake.publications import Publication, TableState, diff_batches, list_keys, list_publications, open_reader
from phasewise.lake.session import open_session, preload_extensions
from phasewise.lake.warehouse import attach_lake
from phasewise.project.config import Project, Table
from phasewise.publishing.audit_batch import AuditedBatch, audit_batch
from phasewise.publishing.audits import audit_published, raise_for
from phasewise.publishing.maintenance import maintain_lake
from phasewise.publishing.publish import publish_batch
from phasewise.publishing.rollback import rollback_batch
from phasewise.publishing.session import open_auditor
from phasewise.report.from_batch import BatchData, write_batch_report
from phasewise.sources import Column, SourceTable
from phasewise.staging.batch import begin_batch, list_batches, read_batch, read_plan, remember_lake
from phasewise.staging.extract import extract_table
from phasewise.staging.forecast import forecast_tables
from phasewise.staging.load_plan import LakeTable, plan_load
from phasewise.staging.manifest import list_manifests
from phasewise.testing.projects import SAMPLE_SETTINGS as SETTINGS
from phasewise.testing.projects import audit_sample, change_source, publish_sample, stage_batch, write_project
from tests.staged import change_project, read_manifest

SOURCE = """
create table t (id integer primary key, v text, at integer);
insert into t values (1, 'a', 10), (2, 'b', 20);
"""
APPEND = '[table.t]\nmode = "append"\ncursor = "at"\nkey = ["id"]\n'
MERGE = '[table.t]\nmode = "merge"\ncursor = "at"\n'
HISTORY = '[table.t]\nmode = "history"\ncursor = "at"\n'


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "ducklake"))


def begin(root: Path, toml: str, source: str = SOURCE) -> Project:
    """Write a project and publish its first batch, ``b0``."""
    project = write_project(root, source=source, toml=toml)
    load(project, "b0")
    return project


def load(project: Project, batch: str, sql: str = "") -> Publication:
    """Change the source, then stage, audit and publish a batch."""
    change_source(project.root, sql)
    stage_batch(project, batch=batch)
    return publish_batch(project, SETTINGS, audit(project, batch))


def audit(project: Project, batch: str) -> AuditedBatch:
    with open_auditor(project, SETTINGS) as session:
        audited = audit_batch(session, read_batch(project, batch))
        expected = session.connection.execute("from t order by all").fetchall()
    raise_for(audited.results)
    _EXPECTED[batch] = expected
    return audited


#: What the audits saw, by batch: the same that is published.
_EXPECTED: dict[str, list[tuple[Any, ...]]] = {}


def rows(project: Project, sql: str = "from t order by all", *, at: str | None = None) -> list[tuple[Any, ...]]:
    with open_reader(project, SETTINGS, at=at) as connection:
        return connection.execute(sql).fetchall()


def list_files(project: Project) -> list[str]:
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        found = connection.execute("select data_file from ducklake_list_files('lake', 't')").fetchall()
    return [Path(name).name for (name,) in found]


def test_append_reads_only_what_is_beyond_the_last_cursor_and_registers_it(tmp_path: Path):
    project = begin(tmp_path, APPEND)

    published = load(project, "b1", "update t set v = 'late' where id = 1; insert into t values (3, 'c', 30)")

    assert rows(project) == [(1, "a", 10), (2, "b", 20), (3, "c", 30)] == _EXPECTED["b1"]
    manifest = read_manifest(project, "b1", "t")
    assert (manifest.load.since, manifest.load.until, manifest.rows) == ("20", "30", 2)  # 20 is there already
    assert (published.tables[0].rows, published.tables[0].added) == (3, 1)


def test_append_without_a_key_adds_what_is_strictly_beyond_and_registers_the_file(tmp_path: Path):
    project = begin(tmp_path, '[table.t]\nmode = "append"\ncursor = "at"\n', SOURCE.replace(" primary key", ""))

    load(project, "b1", "insert into t values (3, 'c', 30), (4, 'tie', 20)")

    assert rows(project) == [(1, "a", 10), (2, "b", 20), (3, "c", 30)]
    assert all(name.startswith("phasewise-") for name in list_files(project))
    assert len(list_files(project)) == 2


def test_late_rows_within_the_lookback_are_appended_once(tmp_path: Path):
    project = begin(tmp_path, APPEND + "lookback = 15\n")

    load(project, "b1", "insert into t values (3, 'late', 6), (4, 'too late', 4), (5, 'new', 21)")

    assert [row[0] for row in rows(project)] == [1, 2, 3, 5]


def test_a_lookback_without_a_key_is_refused(tmp_path: Path):
    toml = '[table.t]\nmode = "append"\ncursor = "at"\nlookback = 5\n'
    project = write_project(tmp_path, source=SOURCE.replace(" primary key", ""), toml=toml)

    with pytest.raises(ProjectError, match="would be doubled"):
        stage_batch(project)


def test_an_append_without_a_key_fails_on_a_row_without_a_cursor(tmp_path: Path):
    project = begin(tmp_path, '[table.t]\nmode = "append"\ncursor = "at"\n', SOURCE.replace(" primary key", ""))

    with pytest.raises(AuditFailed, match=r"cursor\(at\)"):
        load(project, "b1", "insert into t values (3, 'c', null)")


def test_merge_puts_rows_in_the_place_of_those_with_their_key(tmp_path: Path):
    project = begin(tmp_path, MERGE)

    published = load(project, "b1", "update t set v = 'B', at = 25 where id = 2; insert into t values (3, 'c', 20)")

    assert rows(project) == [(1, "a", 10), (2, "B", 25), (3, "c", 20)] == _EXPECTED["b1"]
    table = published.tables[0]
    assert (table.rows, table.added, table.changed, table.removed) == (3, 1, 1, 0)


def test_merge_without_a_cursor_reads_all_rows_and_finds_deleted_ones_when_asked(tmp_path: Path):
    project = begin(tmp_path, '[table.t]\nmode = "merge"\ndeletes = true\n')

    published = load(project, "b1", "delete from t where id = 1; insert into t values (3, 'c', 5)")

    assert rows(project) == [(2, "b", 20), (3, "c", 5)] == _EXPECTED["b1"]
    assert published.tables[0].removed == 1


def test_deleted_rows_are_found_by_comparing_all_keys_and_only_when_asked(tmp_path: Path):
    project = begin(tmp_path, MERGE)
    load(project, "b1", "delete from t where id = 1")
    assert [row[0] for row in rows(project)] == [1, 2]

    load(change_project(project, "[table.t]", "[table.t]\ndeletes = true"), "b2", "insert into t values (3, 'c', 30)")

    assert [row[0] for row in rows(project)] == [2, 3]


def test_columns_may_have_the_names_that_an_increment_would_use(tmp_path: Path):
    source = """create table t (change text primary key, present integer, at integer);
        insert into t values ('a', 0, 10), ('b', 1, 20);"""
    project = begin(tmp_path, '[table.t]\nmode = "merge"\n', source)

    published = load(project, "b1", "update t set present = 5 where change = 'b'; insert into t values ('c', 3, 30)")

    assert rows(project) == [("a", 0, 10), ("b", 5, 20), ("c", 3, 30)]
    assert (published.tables[0].added, published.tables[0].changed) == (1, 1)


def test_keys_of_a_narrower_type_are_compared_in_the_type_of_the_lake(tmp_path: Path):
    source = "create table t (id text, at integer); insert into t values ('abc', 10), ('01', 20);"
    project = begin(tmp_path, MERGE + 'key = ["id"]\ndeletes = true\n', source)

    load(project, "b1", "drop table t; create table t (id integer, at integer); insert into t values (1, 30)")

    assert rows(project) == [("1", 30)]


@pytest.mark.parametrize("toml", ['mode = "append"\ncursor = "id"', 'mode = "merge"', 'drift = "discard"', ""])
def test_a_source_may_have_the_columns_of_a_history_itself(tmp_path: Path, toml: str):
    moment = "TIMESTAMP WITH TIME ZONE"
    types = f'[table.t.columns]\nvalid_from = "{moment}"\nvalid_to = "{moment}"\nis_current = "BOOLEAN"\n'
    source = """create table t (id integer primary key, valid_from text, valid_to text, is_current integer);
        insert into t values (1, '2024-01-01 00:00:00+00:00', null, 1);"""
    project = begin(tmp_path, f"[table.t]\n{toml}\n{types}", source)

    load(project, "b1", "insert into t values (2, '2024-02-01 00:00:00+00:00', null, 1)")

    shown = rows(project, "select id, valid_from::varchar, valid_to, is_current from t order by id")
    assert shown == [(1, "2024-01-01 00:00:00+00", None, True), (2, "2024-02-01 00:00:00+00", None, True)]
    assert read_manifest(project, "b1", "t").load.drift == ()


def test_rows_without_a_cursor_are_merged_each_time(tmp_path: Path):
    project = begin(tmp_path, MERGE)

    load(project, "b1", "insert into t values (3, 'c', null)")
    load(project, "b2", "update t set v = 'C' where id = 3")

    assert rows(project, "select id, v from t order by id") == [(1, "a"), (2, "b"), (3, "C")]


@pytest.mark.parametrize("mode", ["merge", "append", "history"])
def test_two_rows_of_a_batch_with_one_key_fail_the_audit_that_names_the_key(tmp_path: Path, mode: str):
    toml = f'[table.t]\nmode = "{mode}"\ncursor = "at"\nkey = ["id"]\n'
    project = begin(tmp_path, toml, SOURCE.replace(" primary key", ""))
    before = rows(project)
    change_source(project.root, "insert into t values (7, 'x', 30), (7, 'y', 31)")
    stage_batch(project, batch="b1")

    with pytest.raises(AuditFailed, match=r'unique\(id\).\n    {"id": 7, "rows": 2}'):
        audit(project, "b1")
    with pytest.raises(PublishConflict, match="id = 7"):  # publishing does not rely on them
        publish_batch(project, SETTINGS, replace(audit_sample(project, "b1"), results=()))

    assert rows(project) == before


def test_a_history_table_keeps_what_a_row_was(tmp_path: Path):
    project = begin(tmp_path, HISTORY + "deletes = true\n")

    load(project, "b1", "update t set v = 'A', at = 30 where id = 1; delete from t where id = 2")

    found = rows(project, 'select id, v, "at", valid_to is null, is_current from t order by all')
    assert found == [(1, "A", 30, True, True), (1, "a", 10, False, False), (2, "b", 20, False, False)]
    began = {batch: read_plan(project, batch).created_at for batch in ("b0", "b1")}
    times = rows(project, "select valid_from, valid_to from t order by id, valid_from")
    assert times == [(began["b0"], began["b1"]), (began["b1"], None), (began["b0"], began["b1"])]
    assert sorted(_EXPECTED["b1"], key=str) == sorted(rows(project), key=str)


def test_a_history_under_its_old_name_continues(tmp_path: Path):
    project = begin(tmp_path, HISTORY.replace('"history"', '"snapshot"'))
    write_down_old_mode(project)

    load(project, "b1", "update t set v = 'A', at = 30 where id = 1")

    assert rows(project, "select v, is_current from t where id = 1 order by valid_from") == [("a", False), ("A", True)]
    found = read_manifest(project, "b1", "t").load
    assert (found.mode, found.since, found.is_replaced, found.describe()) == ("history", "20", False, ())


def write_down_old_mode(project: Project) -> None:
    """Make the warehouse what a version wrote that called the mode ``snapshot``."""
    with closing(sqlite3.connect(project.warehouse / "catalog.sqlite")) as catalog, catalog:
        new, old = '"mode": "history"', '"mode": "snapshot"'
        changed = catalog.execute(
            "update ducklake_snapshot_changes set commit_extra_info = replace(commit_extra_info, ?, ?) "
            "where instr(commit_extra_info, ?)",
            (new, old, new),
        )
        assert changed.rowcount == 1


def test_a_batch_that_was_staged_under_the_old_name_is_published(tmp_path: Path):
    project = begin(tmp_path, HISTORY)
    change_source(project.root, "update t set v = 'A', at = 30 where id = 1")
    stage_batch(project, batch="b1")
    write_down_old_mode(project)
    for path in (project.staging / "b1").rglob("*.json"):
        path.write_text(path.read_text().replace('"mode": "history"', '"mode": "snapshot"'))

    publish_batch(project, SETTINGS, audit(project, "b1"))

    assert rows(project, "select v, is_current from t where id = 1 order by valid_from") == [("a", False), ("A", True)]


def test_a_row_that_comes_back_is_current_again(tmp_path: Path):
    project = begin(tmp_path, HISTORY + "deletes = true\n")

    load(project, "b1", "delete from t where id = 2")
    load(project, "b2", "insert into t values (2, 'b', 20)")

    assert rows(project, "select v, is_current from t where id = 2 order by valid_from") == [("b", False), ("b", True)]


def test_a_batch_without_changes_is_published_and_changes_no_row(tmp_path: Path):
    project = begin(tmp_path, HISTORY)
    before = rows(project)

    published = load(project, "b1")

    assert (published.batch, published.tables[0].added, published.tables[0].changed) == ("b1", 0, 0)
    assert rows(project) == before
    assert [publication.batch for publication in publications(project)] == ["b0", "b1"]


def publications(project: Project) -> list[Publication]:
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        return list_publications(connection)


@pytest.mark.parametrize("toml", [APPEND, MERGE, HISTORY])
def test_the_same_batch_twice_gives_the_same_lake(tmp_path: Path, toml: str):
    project = begin(tmp_path, toml)
    load(project, "b1", "insert into t values (3, 'c', 30); update t set v = 'B', at = 31 where id = 2")
    before = rows(project), publications(project), list_files(project)

    again = load(project, "b1", "insert into t values (4, 'd', 40)")

    assert again.was_published
    assert (rows(project), publications(project), list_files(project)) == before


def test_a_failed_publish_leaves_the_cursor_and_the_next_batch_reads_the_same_range(tmp_path: Path):
    project = begin(tmp_path, MERGE + '[[audit]]\nname = "a"\nsql = "from t where v = \'bad\'"\n')
    with pytest.raises(AuditFailed):
        load(project, "b1", "insert into t values (3, 'bad', 30)")

    load(project, "b2", "update t set v = 'good' where id = 3")

    assert read_manifest(project, "b2", "t").load.since == "20"
    assert [row[1] for row in rows(project)] == ["a", "b", "good"]


def test_a_resumed_batch_reads_from_where_it_began(tmp_path: Path):
    project = begin(tmp_path, MERGE)
    change_source(tmp_path, "insert into t values (3, 'c', 30)")
    begin_batch(project, "b1", ["t"])
    remember_lake(project, SETTINGS, "b1")
    load(project, "b2")

    manifest = extract_table(project, SETTINGS, batch="b1", table="t")

    assert (manifest.load.since, manifest.rows) == ("20", 2)
    with pytest.raises(PublishConflict):
        publish_sample(project, SETTINGS, "b1")


def test_a_table_whose_name_changes_by_case_only_goes_on(tmp_path: Path):
    project = change_project(begin(tmp_path, APPEND), "[table.t]", "[table.T]")

    first = load(
        project, "b1", "alter table t rename to u; alter table u rename to T; insert into T values (3, 'c', 30)"
    )
    load(project, "b2", "insert into T values (4, 'd', 40)")

    assert [state.table for state in first.states] == ["T"]
    assert rows(project) == [(1, "a", 10), (2, "b", 20), (3, "c", 30), (4, "d", 40)]


def test_what_goes_on_from_another_batch_than_the_lake_s_is_not_published(tmp_path: Path):
    project = begin(tmp_path, MERGE)
    load(project, "b1", "insert into t values (3, 'c', 30)")
    stage_batch(project, batch="b2")
    rollback_batch(project, SETTINGS, "b0")

    with pytest.raises(PublishConflict, match='staged on top of batch "b1", but the warehouse has batch "b0"'):
        publish_sample(project, SETTINGS, "b2")


@pytest.mark.parametrize(
    ("type_", "mark", "since"), [("UINTEGER", "5", "0"), ("TINYINT", "-120", "-128"), ("BIGINT", "5", "-5")]
)
def test_a_lookback_ends_at_the_lowest_value_of_the_type(type_: str, mark: str, since: str):
    table = SourceTable(
        name="t", columns=(Column(name="at", source_type=type_, type=type_, nullable=False),), key=("at",)
    )
    state = TableState(table="t", mode="append", key=("at",), cursor="at", where=None, version=1, mark=mark, batch="b0")

    load = plan_load(
        Table(mode="append", cursor="at", lookback=10), table, LakeTable(columns={"at": type_}, state=state)
    )

    assert (load.since, load.is_replaced) == (since, False)


@pytest.mark.parametrize("toml", [APPEND, MERGE, HISTORY])
def test_a_rollback_takes_the_cursor_back_with_the_rows(tmp_path: Path, toml: str):
    project = begin(tmp_path, toml)
    load(project, "b1", "insert into t values (3, 'c', 30)")
    load(project, "b2", "insert into t values (4, 'd', 40)")
    after_two = rows(project, "select id, v from t order by all")
    first = rows(project, at="b1")

    rollback_batch(project, SETTINGS, "b1")
    assert rows(project) == first
    load(project, "b3")

    assert read_manifest(project, "b3", "t").load.since == "30"
    assert rows(project, "select id, v from t order by all") == after_two


def test_a_rollback_restores_rows_that_were_changed_in_a_few_places(tmp_path: Path):
    project = begin(tmp_path, MERGE)
    # DuckLake keeps a few rows in its catalog: as many are removed from the file there as are added.
    load(project, "b1", "update t set v = 'x', at = 30 where id = 1")
    load(project, "b2", "update t set v = 'y', at = 40 where id = 2")
    load(project, "b3", "update t set v = 'z', at = 50 where id = 1")
    expected = rows(project, at="b2")

    rollback_batch(project, SETTINGS, "b2")

    assert rows(project) == expected == [(1, "x", 30), (2, "y", 40)]


def test_a_rollback_restores_files_that_lack_a_column(tmp_path: Path):
    source = SOURCE.replace(" primary key", "")
    project = begin(tmp_path, '[table.t]\nmode = "append"\ncursor = "at"\n', source)
    load(project, "b1", "alter table t drop v; insert into t values (3, 30)")
    load(project, "b2", "insert into t values (4, 40)")

    rollback_batch(project, SETTINGS, "b1")

    assert rows(project) == [(1, "a", 10), (2, "b", 20), (3, None, 30)]


def test_an_earlier_batch_is_read_as_it_was_and_compared(tmp_path: Path):
    project = begin(tmp_path, MERGE)
    load(project, "b1", "update t set v = 'B', at = 25 where id = 2; insert into t values (3, 'c', 30)")

    assert rows(project, at="b0") == [(1, "a", 10), (2, "b", 20)]
    (difference,) = diff_batches(project, SETTINGS, "b0", "b1")
    assert (difference.added, difference.removed, difference.changed) == (1, 0, 1)


@pytest.mark.parametrize("key", ["", 'key = ["id"]\n'])
def test_small_files_of_many_batches_are_merged_and_a_merged_table_goes_on_and_back(tmp_path: Path, key: str):
    toml = f'[table.t]\nmode = "append"\ncursor = "at"\n{key}'
    project = begin(tmp_path, toml, SOURCE.replace(" primary key", ""))
    for number in range(1, 4):
        load(project, f"b{number}", f"insert into t values ({number + 10}, 'x', {number + 30})")
    before = [rows(project, at=f"b{number}") for number in range(4)]

    maintain_lake(project, SETTINGS)

    assert len(list_files(project)) == 1
    assert [rows(project, at=f"b{number}") for number in range(4)] == before
    load(project, "b4", "insert into t values (99, 'y', 99)")
    assert rows(project) == [*before[3], (99, "y", 99)]
    rollback_batch(project, SETTINGS, "b3")
    assert rows(project) == before[3]


def test_files_of_which_rows_were_deleted_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = """create table t (id integer primary key, v text, at integer); insert into t with recursive
        n(i) as (select 1 union all select i + 1 from n where i < 200) select i, 'a', 0 from n;"""
    project = begin(tmp_path, MERGE, source)
    expected = {}
    for number in range(1, 7):
        # Each night some of the rows that the last one changed, and some of the first file.
        load(
            project,
            f"b{number}",
            f"update t set v = v || 'x', at = {number} where id between {number * 4} and 200 - {number}",
        )
        expected[f"b{number}"] = rows(project)
        maintain_lake(project, SETTINGS)

        assert count_files(project) <= (2, 1)
    assert rows(project) == expected["b6"]
    assert {batch: rows(project, at=batch) for batch in expected} == expected

    # A large file is written anew when it is worth it.
    monkeypatch.setattr("phasewise.publishing.maintenance.MERGE_BELOW_BYTES", 1)
    load(project, "b7", "update t set v = 'few', at = 8 where id < 20")
    maintain_lake(project, SETTINGS)
    assert count_files(project)[1] > 0
    load(project, "b8", "update t set v = 'many', at = 9 where id < 150")
    maintain_lake(project, SETTINGS)
    assert rows(project, "select count(*) from t where v = 'many'") == [(149,)]
    rollback_batch(project, SETTINGS, "b5")
    assert rows(project) == expected["b5"]


def count_files(project: Project) -> tuple[int, int]:
    """Return of how many files the table is made, and how many of them have deleted rows."""
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        return connection.execute(
            "select count(*), count(delete_file) from ducklake_list_files('lake', 't')"
        ).fetchone()


@pytest.mark.parametrize("toml", [MERGE, HISTORY])
def test_maintenance_between_batches_changes_no_row_of_any_snapshot(tmp_path: Path, toml: str):
    project = begin(tmp_path, toml + "deletes = true\n")
    for number in range(1, 5):
        load(
            project,
            f"b{number}",
            f"insert into t values ({number + 10}, 'x', {number + 30}); update t set v = v || {number}, at = at + 20 "
            f"where id % 2 = {number % 2}; delete from t where id = {number}",
        )
        before = [rows(project, at=f"b{older}") for older in range(number + 1)]

        maintain_lake(project, SETTINGS)

        assert [rows(project, at=f"b{older}") for older in range(number + 1)] == before


def test_published_incremental_tables_pass_the_audits_again(tmp_path: Path):
    project = begin(tmp_path, HISTORY + 'key = ["id"]\n')
    load(project, "b1", "update t set v = 'A', at = 30 where id = 1")

    with open_auditor(project, SETTINGS) as session:
        results = audit_published(session)

    assert {result.name for result in results} == {"not_null(id)", "unique(id)"}
    assert all(result.passed for result in results)


def test_the_keys_of_tables_that_batches_do_not_bring_survive_retention(tmp_path: Path):
    project = begin(tmp_path, MERGE, SOURCE + "create table u (id integer primary key); insert into u values (1);")
    for number in range(2):
        extract_table(project, SETTINGS, batch=f"alone{number}", table="u")
        publish_sample(project, SETTINGS, f"alone{number}")
        maintain_lake(project, SETTINGS.model_copy(update={"snapshot_retention_days": 0}))

    assert [publication.batch for publication in publications(project)] == ["alone1"]
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        assert list_keys(connection) == {"t": ("id",), "u": ("id",)}


def test_marts_see_the_whole_table(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE, toml=APPEND, marts={"n": "select count(*) as n from t"})
    load(project, "b0")

    load(project, "b1", "insert into t values (3, 'c', 30)")

    assert rows(project, "from marts.n") == [(3,)]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('cursor = "at"', 'cursor = "id"', "cursor changed"),
        ('cursor = "at"', 'cursor = "at"\nwhere = "id < 3"', "where changed"),
        ('cursor = "at"', 'cursor = "at"\nversion = 2', "version changed"),
        ('mode = "merge"', 'mode = "append"', "the mode or the key has changed"),
        ('mode = "merge"', 'mode = "history"', "the mode or the key has changed"),
    ],
)
def test_a_table_is_loaded_whole_where_what_the_project_says_of_it_has_changed(
    tmp_path: Path, old: str, new: str, reason: str
):
    project = begin(tmp_path, MERGE)

    project = change_project(project, old, new)
    load(project, "b1", "delete from t where id = 1")

    manifest = read_manifest(project, "b1", "t")
    assert (manifest.load.reason, manifest.load.is_replaced) == (reason, True)
    assert rows(project, "select id, v from t") == [(2, "b")]


def test_a_history_survives_a_change_of_its_cursor(tmp_path: Path):
    project = begin(tmp_path, HISTORY)
    load(project, "b1", "update t set v = 'A', at = 30 where id = 1")

    load(change_project(project, '"at"', '"id"'), "b2", "update t set v = 'AA' where id = 1")

    assert rows(project, "select v from t where id = 1 order by valid_from") == [("a",), ("A",), ("AA",)]


def test_a_table_that_another_batch_did_not_bring_keeps_its_cursor(tmp_path: Path):
    project = begin(tmp_path, MERGE, SOURCE + "create table u (id integer primary key); insert into u values (1);")
    extract_table(project, SETTINGS, batch="alone", table="u")
    publish_sample(project, SETTINGS, "alone")

    load(project, "b1", "insert into t values (3, 'c', 30)")

    assert read_manifest(project, "b1", "t").load.since == "20"


def test_a_new_column_is_added_and_a_lost_one_stays(tmp_path: Path):
    project = begin(tmp_path, MERGE, SOURCE.replace("v text,", "v text, w text,").replace("', ", "', 'w', "))

    load(project, "b1", "alter table t add x integer; alter table t drop w; insert into t values (3, 'c', 30, 5)")

    assert rows(project, 'select id, v, w, "at", x from t order by id') == [
        (1, "a", "w", 10, None),
        (2, "b", None, 20, None),  # read again, since rows with the last cursor are
        (3, "c", None, 30, 5),
    ]
    assert read_manifest(project, "b1", "t").load.drift == (
        'The column "w" is gone from the source.',
        'The column "x" (BIGINT) is new.',
    )


@pytest.mark.parametrize("mode", ["append", "merge", "history"])
def test_a_widened_type_is_widened_and_a_narrowed_one_stays_wide(tmp_path: Path, mode: str):
    project = begin(tmp_path, f'[table.t]\nmode = "{mode}"\ncursor = "at"\n', declare("decimal(10,2)", "1, 1.25, 10"))
    history = ", valid_from" if mode == "history" else ""

    load(project, "b1", declare("decimal(18,4)", "1, 1.25, 10), (2, 1.1234, 20"))
    load(project, "b2", declare("decimal(12,3)", "2, 1.5, 29), (3, 3.001, 30"))

    assert rows(project, "select distinct typeof(n) from t") == [("DECIMAL(18,4)",)]
    expected = {"append": [1.25, 1.1234, 3.001], "merge": [1.25, 1.5, 3.001], "history": [1.25, 1.1234, 1.5, 3.001]}
    assert [float(n) for (n,) in rows(project, f"select n from t order by id{history}")] == expected[mode]


@pytest.mark.parametrize("mode", ["append", "merge", "history"])
def test_a_column_that_becomes_text_keeps_its_old_values_as_text(tmp_path: Path, mode: str):
    project = begin(tmp_path, f'[table.t]\nmode = "{mode}"\ncursor = "at"\n', declare("integer", "1, 7, 10"))

    load(project, "b1", declare("text", "1, '7', 10), (2, 'seven', 20"))

    assert rows(project, "select distinct id, n from t order by id") == [(1, "7"), (2, "seven")]
    assert rows(project, "select count(*) from t") == [(2,)]  # 7 is the text 7: no new version of it
    assert read_manifest(project, "b1", "t").load.drift == ('The column "n" was BIGINT and is VARCHAR: widened.',)


@pytest.mark.parametrize("key", ["", 'key = ["id"]\n'])
def test_an_append_that_discards_takes_no_new_column_and_no_wider_type(tmp_path: Path, key: str):
    toml = f'[table.t]\nmode = "append"\ncursor = "at"\ndrift = "discard"\n{key}'
    project = begin(tmp_path, toml, declare("decimal(10,2)", "1, 1.25, 10").replace(" primary key", ""))

    wider = declare("decimal(18,4)", "1, 1.25, 10), (2, 1.5, 20").replace(" primary key", "")
    load(project, "b1", f"{wider} alter table t add x text; update t set x = 'new'")

    assert rows(project, "select id, n::varchar from t order by id") == [(1, "1.25"), (2, "1.50")]
    assert rows(project, "select column_name from (describe t)") == [("id",), ("n",), ("at",)]


def declare(type_: str, values: str) -> str:
    """Return the SQL that makes the source's table anew, with a column *n* of another type."""
    return f"""drop table if exists t; create table t (id integer primary key, n {type_}, at integer);
        insert into t values ({values});"""


def test_a_value_that_a_kept_type_does_not_hold_fails_and_is_never_rounded(tmp_path: Path):
    toml = '[table.t]\nmode = "merge"\ndrift = "discard"\n'
    project = begin(tmp_path, toml, declare("decimal(10,2)", "1, 1.25, 10"))
    load(project, "b1", declare("decimal(18,4)", "1, 1.50, 10"))
    assert rows(project, "select n::varchar from t") == [("1.50",)]

    with pytest.raises(SchemaDrift, match=r"does not hold 1\.1234"):
        load(project, "b2", declare("decimal(18,4)", "1, 1.1234, 10"))


def test_a_value_that_is_too_large_for_a_kept_type_fails_and_names_the_column(tmp_path: Path):
    project = begin(tmp_path, '[table.t]\nmode = "merge"\ndrift = "discard"\n', declare("decimal(4,2)", "1, 1.25, 10"))

    with pytest.raises(SchemaDrift, match=r"column n is DECIMAL\(4,2\) in the warehouse, which does not hold 12345"):
        load(project, "b1", declare("decimal(18,2)", "1, 12345, 10"))


@pytest.mark.parametrize("toml", ["", 'mode = "append"\ncursor = "at"\n'])
def test_a_value_that_does_not_fit_is_found_by_the_audit_where_no_key_is_compared(tmp_path: Path, toml: str):
    source = "create table t (n {}, at integer);"
    project = begin(tmp_path, f'[table.t]\n{toml}drift = "discard"\n', source.format("decimal(10,2)"))
    change_source(
        tmp_path, f"drop table t; {source.format('decimal(18,4)')} insert into t values (1.5, 1), (1.1234, 2)"
    )
    stage_batch(project, batch="b1")

    for run in (lambda: audit(project, "b1"), lambda: publish_sample(project, SETTINGS, "b1")):
        with pytest.raises(
            SchemaDrift, match=r"column n is DECIMAL\(10,2\) in the warehouse, which does not hold 1\.1234"
        ):
            run()


def test_a_contract_narrower_than_what_the_warehouse_keeps_says_so_and_what_to_do(tmp_path: Path):
    project = begin(tmp_path, MERGE, declare("decimal(18,4)", "1, 1.25, 10"))
    project = change_project(project, "[table.t]", '[table.t]\ncolumns = { n = "DECIMAL(10,2)" }')

    with pytest.raises(
        AuditFailed, match=r"the warehouse keeps the wider type that it has: write DECIMAL\(18,4\) into"
    ):
        load(project, "b1", declare("decimal(10,2)", "1, 1.25, 10"))

    load(change_project(project, "[table.t]", "[table.t]\nversion = 2"), "b2")
    assert rows(project, "select typeof(n) from t") == [("DECIMAL(10,2)",)]


def test_freeze_fails_and_names_the_columns(tmp_path: Path):
    project = begin(tmp_path, MERGE + 'drift = "freeze"\n')

    with pytest.raises(SchemaDrift, match=r'"t" is frozen.*"v" is gone.*"x" \(BIGINT\) is new'):
        load(project, "b1", "alter table t add x integer; alter table t drop v")


@pytest.mark.parametrize("mode", ["full", "merge"])
def test_discard_takes_no_new_column_and_fills_a_lost_one_with_nulls(tmp_path: Path, mode: str):
    project = begin(tmp_path, f'[table.t]\nmode = "{mode}"\ndrift = "discard"\n')

    load(project, "b1", "alter table t add x integer; alter table t drop v; insert into t (id, at) values (3, 5)")

    assert rows(project) == [(1, None, 10), (2, None, 20), (3, None, 5)]


def test_a_full_refresh_takes_the_new_columns_and_says_so(tmp_path: Path):
    project = begin(tmp_path, "")

    load(project, "b1", "alter table t add x integer; alter table t drop v")

    assert rows(project) == [(1, 10, None), (2, 20, None)]
    assert len(read_manifest(project, "b1", "t").load.drift) == 2


def test_a_frozen_full_refresh_fails(tmp_path: Path):
    project = begin(tmp_path, '[table.t]\ndrift = "freeze"\n')

    with pytest.raises(SchemaDrift, match="frozen"):
        load(project, "b1", "alter table t add x integer")


def test_values_of_two_kinds_cannot_stand_in_one_column(tmp_path: Path):
    toml = '[table.t]\nmode = "merge"\ncursor = "id"\ncolumns = { d = "DATE" }\n'
    project = begin(tmp_path, toml, "create table t (id integer primary key, d date); insert into t values (1, null);")

    with pytest.raises(SchemaDrift, match='old and new values of "d"'):
        load(change_project(project, '"DATE"', '"BIGINT"'), "b1")


_TEN = "2024-01-01 10:00:00"


@pytest.mark.parametrize(
    ("declared", "contract", "values", "more", "since"),
    [
        ("decimal(10,2)", "", (9.5, 10.25), 10.26, "10.25"),
        ("date", "", ("'2024-02-28'", "'2024-02-29'"), "'2024-03-01'", "2024-02-29"),
        ("text", "", ("'9'", "'Z'"), "'a'", "Z"),
        (
            "timestamp",
            "",
            ("'2024-01-01T10:00:00.5'", "'2024-01-01 10:00:00'"),
            "'2024-01-01 10:00:00.51'",
            f"{_TEN}.5",
        ),
        ("text", "TIMESTAMP", ("'2023-01-01 10:00:00'", "'2024-01-01 10:00:00'"), "'2024-01-01T10:00:01'", _TEN),
    ],
)
def test_cursors_of_every_kind_are_compared_as_the_lake_would(
    tmp_path: Path, declared: str, contract: str, values: tuple[object, object], more: object, since: str
):
    toml = MERGE + (f'columns = {{ at = "{contract}" }}\n' if contract else "")
    source = f"create table t (id integer primary key, at {declared}); insert into t values (1, {values[0]}), (2, {values[1]});"  # noqa: E501
    project = begin(tmp_path, toml, source)

    load(project, "b1", f"insert into t values (3, {more}), (4, {values[0]})")

    manifest = read_manifest(project, "b1", "t")
    assert manifest.load.since == since
    assert manifest.rows in (2, 3)  # the last row again, the new one, and 4 where its value was the last
    assert 3 in [row[0] for row in rows(project)]


def test_a_lookback_of_time_is_taken_from_a_timestamp(tmp_path: Path):
    source = "create table t (id integer primary key, at timestamp); insert into t values (1, '2024-03-01 12:00:00');"
    project = begin(tmp_path, MERGE + 'lookback = "2 days"\n', source)

    load(project, "b1", "insert into t values (2, '2024-02-28 12:00:00'), (3, '2024-02-28 11:59:59')")

    assert [row[0] for row in rows(project)] == [1, 2]


@pytest.mark.parametrize("declared", ["real", "blob", "weird"])
def test_a_column_without_a_reliable_order_is_no_cursor(tmp_path: Path, declared: str):
    source = f"create table t (id integer primary key, at {declared});"
    project = write_project(tmp_path, source=source, toml=MERGE)

    with pytest.raises(ProjectError, match="cannot be a cursor"):
        stage_batch(project)


def test_a_history_needs_a_key_and_free_names(tmp_path: Path):
    project = write_project(tmp_path, source="create table t (a integer, at integer);", toml=HISTORY)
    with pytest.raises(ProjectError, match="no key"):
        stage_batch(project)

    change_source(tmp_path, "drop table t; create table t (id integer primary key, at integer, valid_to date);")
    with pytest.raises(SchemaDrift, match="valid_to"):
        stage_batch(project)


def test_a_forecast_says_what_would_be_read_and_what_changed_and_loads_nothing(tmp_path: Path):
    toml = MERGE + '[table.u]\nmode = "history"\n[table.w]\ndrift = "freeze"\n'
    more = "create table u (id integer primary key); create table w (id integer primary key);"
    project = begin(tmp_path, toml, SOURCE + more)
    change_source(
        tmp_path,
        "insert into t values (3, 'c', 30); alter table t add x text; alter table w add x text;"
        "create table y (id integer primary key); insert into y values (7);",
    )

    t, u, w, y = forecast_tables(change_project(project, 'mode = "history"', 'mode = "history"\nversion = 2'), SETTINGS)

    assert (t.mode, t.since, t.rows, t.notes) == ("merge", "20", 2, ('The column "x" (VARCHAR) is new.',))
    assert (u.mode, u.since, u.notes) == ("history", None, ("read whole: version changed",))
    assert w.problem is not None
    assert '"w" is frozen' in w.problem
    assert (y.mode, y.rows, y.problem) == ("full", 7, None)  # an estimate: the highest row id
    assert [batch.id for batch in list_batches(project)] == ["b0"]


def test_the_report_says_what_an_increment_did(tmp_path: Path):
    project = begin(tmp_path, MERGE)
    publication = load(project, "b1", "insert into t values (3, 'c', 30); alter table t add x text")
    manifests = list_manifests(project, "b1")

    data = BatchData(project=project, batch="b1", status="published", manifests=manifests, publication=publication)
    files = write_batch_report(data)

    (table,) = json.loads(files.json.read_text())["tables"]
    assert table["notes"] == [
        "merge: rows added 1, changed 0, removed 0; 3 in the table",
        "read from at 20 to 30",
        'The column "x" (VARCHAR) is new.',
    ]
