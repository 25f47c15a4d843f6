"""Audits: what is staged is what the source had, keys and references hold, and a failed audit says which rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from phasewise.errors import AuditFailed, ProjectError, StagingError
from phasewise.lake.session import preload_extensions
from phasewise.project.config import Project
from phasewise.publishing.audit_batch import audit_batch
from phasewise.publishing.audits import AuditResult, audit_published, raise_for
from phasewise.publishing.session import open_auditor
from phasewise.staging.batch import Batch, begin_batch, read_batch
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import staged_files
from phasewise.testing.projects import (
    SAMPLE_SETTINGS,
    audit_sample,
    change_source,
    publish_sample,
    stage_batch,
    write_project,
)

SOURCE = """
create table people (id integer primary key, name text);
insert into people values (1, 'Babe'), (2, 'Hank'), (3, 'Willie');
create table hits (person integer, year integer, n integer, primary key (person, year));
insert into hits values (1, 1920, 172), (2, 1959, 223), (3, 1954, 195);
"""


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "ducklake"))


def audit(project: Project, batch: str | None = None) -> list[AuditResult]:
    return list(audit_sample(project, batch or stage_batch(project)).results)


def audit_changed(project: Project, batch: Batch, *, is_partial: bool = False) -> list[AuditResult]:
    with open_auditor(project, SAMPLE_SETTINGS) as session:
        return list(audit_batch(session, batch, is_partial=is_partial).results)


def failed(results: list[AuditResult]) -> list[AuditResult]:
    return [result for result in results if not result.passed]


def find(results: list[AuditResult], name: str, table: str | None = None) -> AuditResult:
    return next(result for result in results if result.name == name and table in (None, result.table))


def test_faithful_tables_pass_every_audit(tmp_path: Path):
    toml = """
    [table.hits]
    columns = { person = "BIGINT", n = "int8" }
    references = [{ columns = ["person"], table = "people", to = ["id"] }]
    [[audit]]
    name = "no_negative_hits"
    table = "hits"
    sql = "from hits where n < 0; -- comment"
    """
    results = audit(write_project(tmp_path, source=SOURCE, toml=toml))

    assert failed(results) == []
    assert {result.name for result in results if result.table == "hits"} == {
        "row count",
        "columns",
        "contract",
        "not_null(person, year)",
        "unique(person, year)",
        "references(person → people)",
        "no_negative_hits",
    }
    raise_for(results)


def test_a_planned_table_that_is_not_staged_fails_the_batch(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE)
    begin_batch(project, "b", ["hits", "people"])
    extract_table(project, SAMPLE_SETTINGS, batch="b", table="hits")

    result = find(audit(project, "b"), "complete")

    assert not result.passed
    assert result.message == 'The batch failed its audit: table "people" is not staged: start a new batch.'


def test_a_duplicate_key_is_shown_with_its_rows(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE, toml='[table.hits]\nkey = ["year"]')
    change_source(tmp_path, "insert into hits values (2, 1954, 131), (3, 1920, 9), (1, 1954, 200)")

    result = find(audit(project), "unique(year)")

    assert result.bad_rows == 2
    assert sorted((row["year"], row["rows"]) for row in result.sample) == [(1920, 2), (1954, 3)]
    assert result.message == 'Table "hits" failed its audit: 2 rows break unique(year).'


def test_a_null_in_a_key_fails_and_is_no_duplicate(tmp_path: Path):
    source = "create table t (a text, b text); insert into t values ('x', null), (null, null), (null, null), ('y', 'z')"
    results = audit(write_project(tmp_path, source=source, toml='[table.t]\nkey = ["a", "b"]'))

    assert [(result.name, result.bad_rows) for result in failed(results)] == [("not_null(a, b)", 3)]


def test_a_key_column_that_does_not_exist_fails_by_name(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE, toml='[table.hits]\nkey = ["yaer"]')
    batch = _staged(project)
    manifests = tuple(replace(manifest, key=("yaer",)) for manifest in batch.manifests)

    results = failed(audit_changed(project, replace(batch, manifests=manifests)))

    assert results
    assert all("yaer" in (result.error or "") for result in results)


def _staged(project: Project) -> Batch:
    plain = project.model_copy(update={"table": {}})
    return read_batch(plain, stage_batch(plain))


def test_a_reference_to_nowhere_is_counted(tmp_path: Path):
    toml = '[table.hits]\nreferences = [{ columns = ["person"], table = "people", to = ["id"] }]'
    project = write_project(tmp_path, source=SOURCE, toml=toml)
    change_source(tmp_path, "delete from people where id = 2; insert into hits values (null, 2000, 1)")

    result = find(audit(project), "references(person → people)")

    assert (result.bad_rows, result.sample) == (1, ({"person": 2, "year": 1959, "n": 223},))


def test_a_reference_to_a_table_that_is_nowhere_fails(tmp_path: Path):
    toml = '[table.hits]\nreferences = [{ columns = ["person"], table = "persons", to = ["id"] }]'

    result = find(audit(write_project(tmp_path, source=SOURCE, toml=toml)), "references(person → persons)")

    assert "persons" in (result.error or "")
    assert result.message.startswith('Table "hits" could not be audited')


def test_a_reference_needs_as_many_columns_on_both_sides(tmp_path: Path):
    toml = '[table.hits]\nreferences = [{ columns = ["person", "year"], table = "people", to = ["id"] }]'

    with pytest.raises(ProjectError, match=r"phasewise\.toml:\d+: .*2 columns cannot refer to 1"):
        write_project(tmp_path, source=SOURCE, toml=toml)


def test_lost_rows_fail_the_batch(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE)
    batch = _staged(project)
    manifests = tuple(replace(manifest, source_rows=4) for manifest in batch.manifests)

    result = find(audit_changed(project, replace(batch, manifests=manifests)), "row count", "hits")

    assert result.message == ('Table "hits" failed its audit: 3 rows are staged, 3 were written and the source had 4.')


def test_a_changed_type_breaks_the_contract(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE)
    batch = stage_batch(project)
    strict = write_project(
        tmp_path, source="", toml='[table.people]\ncolumns = { id = "INTEGER", name = "VARCHAR", born = "DATE" }'
    )

    result = find(audit(strict, batch), "contract", "people")

    assert result.bad_rows == 2
    assert result.detail == (
        'column "id" is BIGINT, its contract says INTEGER; column "born" is missing, its contract says DATE'
    )


def test_an_audit_that_cannot_run_blocks_even_as_a_warning(tmp_path: Path):
    toml = '[[audit]]\nname = "typo"\nsql = "from hitz"\nseverity = "warning"'

    result = find(audit(write_project(tmp_path, source=SOURCE, toml=toml)), "typo")

    assert result.severity == "blocking"
    with pytest.raises(AuditFailed, match="could not be audited: typo: Catalog Error.*hitz"):
        raise_for([result])


@pytest.mark.parametrize("sql", ["drop view hits", "select 1; select 2", "create table x as select 1"])
def test_an_audit_only_ever_selects(tmp_path: Path, sql: str):
    project = write_project(tmp_path, source=SOURCE, toml=f'[[audit]]\nname = "a"\nsql = "{sql}"')

    assert "must be one SELECT" in (find(audit(project), "a").error or "")


def test_a_warning_does_not_block(tmp_path: Path):
    toml = '[[audit]]\nname = "few"\ntable = "hits"\nsql = "from hits where n < 200"\nseverity = "warning"'
    results = audit(write_project(tmp_path, source=SOURCE, toml=toml))

    raise_for(results)
    assert [result.message for result in failed(results)] == ['Table "hits" has a warning: 2 rows break few.']


def test_the_sample_is_bounded_and_the_count_is_not(tmp_path: Path):
    toml = '[[audit]]\nname = "all"\nsql = "from hits, range(1000)"'

    result = find(audit(write_project(tmp_path, source=SOURCE, toml=toml)), "all")

    assert (result.bad_rows, len(result.sample)) == (3000, 20)


def test_the_failure_lists_every_blocking_audit_and_some_rows():
    row = {"playerID": "ruthba01", "n": 1}
    results = [
        AuditResult(name="unique(playerID)", table="batting", bad_rows=7, sample=(row,) * 7),
        AuditResult(name="few", table="people", severity="warning", bad_rows=1),
        AuditResult(name="row count", table="teams", bad_rows=1, detail="3 rows are staged, the source had 4"),
    ]

    with pytest.raises(AuditFailed) as caught:
        raise_for(results)

    assert str(caught.value) == (
        'Table "batting" failed its audit: 7 rows break unique(playerID).\n'
        '    {"playerID": "ruthba01", "n": 1}\n'
        '    {"playerID": "ruthba01", "n": 1}\n'
        '    {"playerID": "ruthba01", "n": 1}\n'
        "    …\n"
        'Table "teams" failed its audit: 3 rows are staged, the source had 4.\n'
        "Nothing was published. See them: phasewise audit batting --show"
    )


def test_damaged_files_say_how_to_mend_them(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE)
    batch = stage_batch(project)
    file = staged_files(project, read_batch(project, batch).manifests[0])[0]
    file.write_bytes(bytes(file.stat().st_size))

    with pytest.raises(StagingError, match=r'staged files of table "hits" cannot be read: .* Start a new batch'):
        audit(project, batch)


def test_a_table_that_is_not_staged_is_audited_as_published(tmp_path: Path):
    toml = '[table.hits]\nreferences = [{ columns = ["person"], table = "people", to = ["id"] }]'
    project = write_project(tmp_path, source=SOURCE, toml=toml)
    publish_sample(project, SAMPLE_SETTINGS, stage_batch(project))
    extract_table(project, SAMPLE_SETTINGS, batch="b", table="hits")

    assert failed(audit(project, "b")) == []


def test_folders_that_look_like_partitions_add_no_column(tmp_path: Path):
    root = tmp_path / "year=2024"
    root.mkdir()

    assert failed(audit(write_project(root, source=SOURCE))) == []


def test_odd_names_are_audited_like_any_other(tmp_path: Path):
    source = """
    create table "select * from ""x""; 🐘" ("order by" integer primary key, "a ""b"" c" text, "rows" text);
    insert into "select * from ""x""; 🐘" values (1, 'x', 'y');
    """
    assert failed(audit(write_project(tmp_path, source=source))) == []


def test_published_tables_keep_the_keys_of_their_source(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE)
    publish_sample(project, SAMPLE_SETTINGS, stage_batch(project))
    stricter = write_project(tmp_path, source="", toml='[[audit]]\nname = "a"\nsql = "from hits"')

    with open_auditor(stricter, SAMPLE_SETTINGS) as session:
        results = audit_published(session)

    assert {result.name for result in results} >= {"unique(person, year)", "unique(id)", "not_null(id)"}
    assert [(result.name, result.bad_rows) for result in failed(results)] == [("a", 3)]


def test_a_table_that_is_staged_alone_is_audited_but_for_what_needs_others(tmp_path: Path):
    toml = '[table.hits]\nkey = ["person"]\nreferences = [{ columns = ["person"], table = "people", to = ["id"] }]\n'
    project = write_project(tmp_path, source=SOURCE, toml=toml)
    change_source(tmp_path, "insert into hits values (1, 1921, 204)")
    extract_table(project, SAMPLE_SETTINGS, batch="alone", table="hits")

    results = list(audit_sample(project, "alone", is_partial=True).results)

    assert find(results, "unique(person)").bad_rows == 1
    (reference,) = [result for result in results if result.name.startswith("references")]
    assert reference.severity == "warning"
    assert reference.error == 'it needs "people", which is neither staged nor published'
