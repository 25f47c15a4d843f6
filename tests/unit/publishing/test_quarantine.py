"""The quarantine: exactly the bad rows are set aside, the rest is published, and mended rows come back."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pytest

from phasewise.errors import AuditFailed, NothingStaged, ProjectError
from phasewise.lake.publications import diff_batches, query_warehouse
from phasewise.lake.session import preload_extensions
from phasewise.lake.warehouse import has_lake
from phasewise.project.config import Project, load_project
from phasewise.publishing.audit_batch import AuditedBatch
from phasewise.publishing.audits import AuditResult, raise_for
from phasewise.publishing.maintenance import maintain_lake
from phasewise.publishing.publish import Publication
from phasewise.publishing.replay import Replay, replay_quarantine
from phasewise.publishing.rollback import rollback_batch
from phasewise.publishing.session import open_writer
from phasewise.staging.manifest import digest_path, staged_files
from phasewise.testing.projects import (
    SAMPLE_SETTINGS,
    audit_sample,
    change_source,
    publish_sample,
    stage_batch,
    write_project,
)
from tests.staged import read_manifest

SOURCE = """
create table customer (id integer, name text);
insert into customer values (1, 'Ann'), (2, 'Bob'), (2, 'Bert'), (3, 'Cid'), (null, 'Dan');
create table orders (id integer, customer integer, amount integer);
insert into orders values (10, 1, 5), (11, 2, 6), (12, 3, -7), (13, 9, 8), (14, null, 9);
"""
TOML = """
[table.customer]
key = ["id"]
quarantine = ["key"]
quarantine_limit = 3
[table.orders]
key = ["id"]
references = [{ columns = ["customer"], table = "customer", to = ["id"] }]
quarantine = ["references"]
quarantine_limit = "60%"
[[audit]]
name = "positive"
table = "orders"
severity = "quarantine"
sql = "select id, amount from orders where amount < 0"
"""
MARTS = {"total": "select sum(amount)::bigint as total from orders"}


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "ducklake"))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return write_project(tmp_path, source=SOURCE, toml=TOML, marts=MARTS)


def publish(project: Project, batch: str | None = None) -> Publication:
    batch = batch or stage_batch(project)
    return publish_sample(project, SAMPLE_SETTINGS, batch)


def query(project: Project, sql: str, at: str | None = None) -> list[tuple[object, ...]]:
    return query_warehouse(project, SAMPLE_SETTINGS, sql, at=at)[1]


def find(found: AuditedBatch, name: str) -> AuditResult:
    return next(result for result in found.results if result.name == name)


def mend(project: Project, sql: str) -> None:
    with open_writer(project, SAMPLE_SETTINGS) as session:
        session.connection.execute(sql)


def test_bad_rows_are_set_aside_with_their_reasons_and_the_rest_is_published_with_its_marts(project: Project):
    publication = publish(project)

    # Which Bob is the customer 2 nobody knows, so both are out, and with them the order that refers to them.
    assert query(project, "from customer order by id") == [(1, "Ann"), (3, "Cid")]
    assert query(project, "from orders order by id") == [(10, 1, 5), (14, None, 9)]
    assert query(project, "from marts.total") == [(14,)]
    assert query(project, "select name, _reason from _quarantine.customer order by name") == [
        ("Bert", "unique(id)"),
        ("Bob", "unique(id)"),
        ("Dan", "not_null(id)"),
    ]
    assert query(project, "select id, _reason, _batch from _quarantine.orders order by id") == [
        (11, "references(customer → customer)", publication.batch),
        (12, "positive", publication.batch),
        (13, "references(customer → customer)", publication.batch),
    ]
    counts = {table.name: (table.rows, table.quarantined) for table in publication.tables}
    assert counts == {"customer": (2, 3), "orders": (2, 3)}


def test_the_names_of_the_folders_above_a_project_are_no_columns(tmp_path: Path):
    folder = tmp_path / "id=9" / "row=7" / "reason=x"
    folder.mkdir(parents=True)
    project = write_project(folder, source=SOURCE, toml=TOML, marts=MARTS)

    publish(project)

    assert query(project, "from customer order by id") == [(1, "Ann"), (3, "Cid")]
    assert query(project, "select name, _reason from _quarantine.customer order by name")[0] == ("Bert", "unique(id)")
    assert query(project, "from marts.total") == [(14,)]


def test_the_results_say_how_many_rows_were_set_aside_and_why(project: Project):
    found = audit_sample(project, stage_batch(project))

    references = find(found, "references(customer → customer)")
    assert (references.severity, references.bad_rows) == ("quarantine", 2)
    assert references.message == 'Table "orders" has rows set aside: 2 rows break references(customer → customer).'
    assert [aside.describe() for aside in found.set_aside] == [
        "3 rows are in quarantine: not_null(id) 1, unique(id) 2",
        "3 rows are in quarantine: positive 1, references(customer → customer) 2",
    ]
    raise_for(found.results)


def test_more_bad_rows_than_the_limit_allows_stop_the_batch(project: Project):
    change_source(project.root, "insert into customer values (null, 'Eve')")

    with pytest.raises(
        AuditFailed, match='"customer" failed its audit: 4 rows would be set aside, and quarantine_limit'
    ):
        publish(project)

    assert not has_lake(project)


def test_without_the_setting_bad_rows_stop_the_batch(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE, toml='[table.customer]\nkey = ["id"]')

    with pytest.raises(AuditFailed, match=r"unique\(id\)"):
        publish(project)


def test_a_row_that_breaks_two_audits_is_set_aside_once_for_both_reasons(project: Project):
    change_source(project.root, "delete from orders where id = 11; insert into orders values (15, 9, -1)")

    publish(project)

    assert query(project, "select _reason from _quarantine.orders where id = 15") == [
        ("positive; references(customer → customer)",)
    ]


def test_the_next_batch_replaces_table_and_quarantine(project: Project):
    publish(project)
    change_source(project.root, "update customer set id = 4 where name = 'Bert'; delete from customer where id is null")
    change_source(
        project.root, "update orders set amount = 1 where id = 12; update orders set customer = 4 where id = 13"
    )

    publish(project)

    assert query(project, "select count(*) from customer") == [(4,)]
    assert query(project, "select count(*) from orders") == [(5,)]
    assert query(project, "select table_name from duckdb_tables() where schema_name = '_quarantine'") == []


def test_mended_rows_come_back_in_a_snapshot_of_their_own_and_others_stay(project: Project):
    first = publish(project)
    mend(project, "update lake._quarantine.customer set id = 4 where name = 'Bert'")
    mend(project, "update lake._quarantine.orders set amount = 7 where id = 12")

    replays = replay_quarantine(project, SAMPLE_SETTINGS)

    # Bob is the only customer 2 now, so that his order comes back with him.
    assert replays == [
        Replay(table="customer", returned=2, left=1, rows=4),
        Replay(table="orders", returned=2, left=1, rows=4),
    ]
    assert query(project, "from customer order by id") == [(1, "Ann"), (2, "Bob"), (3, "Cid"), (4, "Bert")]
    assert query(project, "select id from orders order by id") == [(10,), (11,), (12,), (14,)]
    assert query(project, "from marts.total") == [(27,)]
    assert query(project, "select id from _quarantine.orders") == [(13,)]
    [kind] = query(
        project,
        "select json_extract_string(commit_extra_info, 'kind') from lake.snapshots() order by snapshot_id desc limit 1",
    )[0]
    assert (kind, first.kind) == ("replay", "publish")


def test_a_new_rule_lets_rows_come_back(project: Project):
    publish(project)
    (project.root / "phasewise.toml").write_text(
        (project.root / "phasewise.toml").read_text().replace("amount < 0", "amount < -9")
    )

    replays = replay_quarantine(load_project(project.root), SAMPLE_SETTINGS, ["orders"])

    assert replays == [Replay(table="orders", returned=1, left=2, rows=3)]


def test_a_row_whose_key_is_published_meanwhile_stays(project: Project):
    publish(project)
    mend(project, "update lake._quarantine.customer set id = 1 where name = 'Bert'")

    replay_quarantine(project, SAMPLE_SETTINGS)

    assert query(project, "select name from _quarantine.customer where id = 1") == [("Bert",)]
    assert query(project, "select name from customer where id = 1") == [("Ann",)]


def test_nothing_that_passes_makes_no_snapshot(project: Project):
    publish(project)
    before = query(project, "select count(*) from lake.snapshots()")

    assert all(replay.returned == 0 for replay in replay_quarantine(project, SAMPLE_SETTINGS))

    assert query(project, "select count(*) from lake.snapshots()") == before


def test_a_replay_without_a_quarantine_says_so(project: Project):
    publish(project)

    with pytest.raises(NothingStaged, match="no rows of nothing in quarantine"):
        replay_quarantine(project, SAMPLE_SETTINGS, ["nothing"])


def test_mended_rows_that_break_a_blocking_audit_change_nothing(project: Project):
    toml = '[[audit]]\nname = "small"\nsql = "select sum(amount) from orders having sum(amount) > 15"\n'
    with (project.root / "phasewise.toml").open("a") as file:
        file.write(toml)
    project = load_project(project.root)
    publish(project)
    mend(project, "update lake._quarantine.orders set amount = 7 where id = 12")

    with pytest.raises(AuditFailed, match="small"):
        replay_quarantine(project, SAMPLE_SETTINGS)

    assert query(project, "select count(*) from orders") == [(2,)]


def test_rollback_and_looking_back_take_the_quarantine_along(project: Project):
    first = publish(project)
    change_source(project.root, "delete from orders where amount < 0; delete from customer where id is null")
    second = publish(project)

    assert query(project, "select count(*) from _quarantine.customer") == [(2,)]
    assert query(project, "select count(*) from _quarantine.customer", at=first.batch) == [(3,)]
    rollback_batch(project, SAMPLE_SETTINGS, first.batch)

    assert query(project, "select count(*) from _quarantine.customer") == [(3,)]
    assert query(project, "from orders order by id") == [(10, 1, 5), (14, None, 9)]
    assert all(entry.is_same for entry in diff_batches(project, SAMPLE_SETTINGS, first.batch, second.batch))


def test_maintenance_keeps_what_is_set_aside_and_what_is_not(project: Project):
    publish(project)
    settings = SAMPLE_SETTINGS.model_copy(update={"snapshot_retention_days": 0})

    for _ in range(2):
        maintain_lake(project, settings)

    assert query(project, "from orders order by id") == [(10, 1, 5), (14, None, 9)]
    assert query(project, "select count(*) from _quarantine.orders") == [(3,)]


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("", 'must return all columns of "notes", which has no key; it returns size'),
        ('[table.notes]\nkey = ["id"]', r"must return all columns of \"notes\" or its key (id); it returns size"),
    ],
)
def test_rows_that_an_audit_does_not_identify_stop_the_batch(tmp_path: Path, toml: str, problem: str):
    sql = 'sql = "select size from notes where size > 1"'
    project = write_project(
        tmp_path,
        source="create table notes (id integer, size integer); insert into notes values (1, 1), (2, 2)",
        toml=f'{toml}\n[[audit]]\nname = "small"\ntable = "notes"\nseverity = "quarantine"\n{sql}',
    )

    result = find(audit_sample(project, stage_batch(project)), "small")

    assert result.severity == "blocking"
    assert problem.replace("\\", "") in (result.error or "")


@pytest.mark.parametrize("returned", ["id + 10 as id", "id::varchar as id"])
def test_a_key_that_the_audit_changed_stops_the_batch(tmp_path: Path, returned: str):
    project = write_project(
        tmp_path,
        source="create table notes (id integer primary key, size integer); insert into notes values (1, 1), (2, 2)",
        toml='[[audit]]\nname = "small"\ntable = "notes"\nseverity = "quarantine"\n'
        f'sql = "select {returned} from notes where size > 1"',
    )

    result = find(audit_sample(project, stage_batch(project)), "small")

    assert result.severity == "blocking"
    assert result.error is not None


def test_a_table_without_a_key_is_told_apart_by_whole_rows_and_several_files(tmp_path: Path):
    project = write_project(
        tmp_path,
        source="create table notes (text text); insert into notes values ('a'), ('b'), ('a'), (null), ('c')",
        toml='[table.notes]\nquarantine_limit = "80%"\n[[audit]]\nname = "no_a"\ntable = "notes"\n'
        'severity = "quarantine"\nsql = "from notes where text = \'a\' or text is null"',
    )
    batch = stage_batch(project)
    _split_in_two(project, batch, "notes")

    publish(project, batch)

    assert query(project, "from notes order by 1") == [("b",), ("c",)]
    assert query(project, "select text from _quarantine.notes order by 1") == [("a",), ("a",), (None,)]


def _split_in_two(project: Project, batch: str, table: str) -> None:
    """Make the staged file of *table* two, as an extraction in parts would leave them."""
    [whole] = staged_files(project, read_manifest(project, batch, table))
    parts = [whole.with_name(f"{number}.parquet") for number in (1, 2)]
    for part, condition in zip(parts, ("< 3", ">= 3"), strict=True):
        duckdb.sql(f"copy (from '{whole}' where file_row_number {condition}) to '{part}'")
    path = whole.with_name("manifest.json")
    manifest = json.loads(path.read_text())
    manifest |= {"files": [part.name for part in parts], "digests": [digest_path(part) for part in parts]}
    manifest |= {"size_bytes": sum(part.stat().st_size for part in parts)}
    path.write_text(json.dumps(manifest))


def test_a_column_whose_name_the_quarantine_needs_is_refused(tmp_path: Path):
    project = write_project(
        tmp_path,
        source="create table files (filename text primary key); insert into files values ('a')",
        toml='[table.files]\nquarantine = ["key"]',
    )

    with pytest.raises(ProjectError, match='has a column "filename"'):
        audit_sample(project, stage_batch(project))


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('[table.orders]\nquarantine_limit = "many"', "neither a number nor a share"),
        ('[[audit]]\nname = "x"\nsql = "select 1"\nseverity = "quarantine"', "needs the table"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(tmp_path: Path, toml: str, message: str):
    with pytest.raises(ProjectError, match=message):
        write_project(tmp_path, source=SOURCE, toml=toml)
