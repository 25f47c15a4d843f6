"""What ties publishing to auditing: what is published is what was audited, byte by byte, and read once."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pytest

from phasewise.errors import AuditFailed, PublishConflict
from phasewise.lake.publications import query_warehouse
from phasewise.lake.session import preload_extensions
from phasewise.project.config import Audit, Project
from phasewise.publishing.audit_batch import audit_batch
from phasewise.publishing.audits import run_audit
from phasewise.publishing.publish import publish_batch
from phasewise.publishing.session import WarehouseSession, open_auditor, open_writer
from phasewise.report.finish import finish_batch
from phasewise.staging.batch import begin_batch, give_up_tables, read_batch
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import batch_folder, staged_files, staged_key_files
from phasewise.testing.projects import SAMPLE_SETTINGS as SETTINGS
from phasewise.testing.projects import audit_sample, change_source, publish_sample, stage_batch, write_project

SOURCE = """
create table t (id integer primary key, n integer, at integer);
insert into t with recursive n(i) as (select 1 union all select i + 1 from n where i < 3000)
    select i, i * 7919 % 10007, 1 from n;
create table u (id integer primary key); insert into u values (1);
"""
MERGE = '[table.t]\nmode = "merge"\ncursor = "at"\ndeletes = true\n'


@pytest.fixture(scope="module", autouse=True)
def _preloaded() -> None:
    preload_extensions(("sqlite_scanner", "ducklake"))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return write_project(tmp_path, source=SOURCE)


def query(project: Project, sql: str) -> list[tuple[Any, ...]]:
    return query_warehouse(project, SETTINGS, sql)[1]


def flip(file: Path, share: float) -> None:
    """Change one byte of *file*, at *share* of its length."""
    content = bytearray(file.read_bytes())
    content[int(share * (len(content) - 1))] ^= 0x01
    file.write_bytes(content)


def list_lake_files(project: Project) -> set[str]:
    return {path.name for path in Path(project.data_path).rglob("*.parquet")}


@pytest.mark.parametrize("share", [number / 11 for number in range(12)])
def test_a_staged_file_in_which_a_byte_flipped_is_never_published(project: Project, share: float):
    batch = stage_batch(project)
    audited = audit_sample(project, batch)
    [file] = staged_files(project, audited.batch.by_table["t"][0])
    flip(file, share)

    with pytest.raises(PublishConflict, match=rf'of table "t" .* {file.name} has changed.* Start a new batch'):
        publish_batch(project, SETTINGS, audited)

    assert not list_lake_files(project)
    publish_sample(project, SETTINGS, stage_batch(project))  # as the message says
    assert query(project, "select sum(n) from t") == [(sum(number * 7919 % 10007 for number in range(1, 3001)),)]


def test_a_byte_that_flipped_before_the_audits_is_not_published_either(project: Project):
    batch = stage_batch(project)
    [file] = staged_files(project, read_batch(project, batch).by_table["t"][0])
    flip(file, 0.4)

    with pytest.raises((PublishConflict, AuditFailed)):
        publish_sample(project, SETTINGS, batch)


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 1])
@pytest.mark.parametrize("kind", ["rows", "keys"])
def test_the_rows_and_the_keys_of_an_increment_are_those_that_were_audited(tmp_path: Path, share: float, kind: str):
    project = write_project(tmp_path, source=SOURCE, toml=MERGE)
    publish_sample(project, SETTINGS, stage_batch(project))
    change_source(tmp_path, "update t set n = -1, at = 2 where id <= 2000; delete from t where id > 2900")
    batch = stage_batch(project)
    audited = audit_sample(project, batch)
    before, files = query(project, "select count(*), sum(n) from t"), list_lake_files(project)
    [file] = (staged_files if kind == "rows" else staged_key_files)(project, audited.batch.by_table["t"][0])
    flip(file, share)

    with pytest.raises(PublishConflict, match=f"{file.name} has changed"):
        publish_batch(project, SETTINGS, audited)
    flip(file, share)
    assert (query(project, "select count(*), sum(n) from t"), list_lake_files(project)) == (before, files)

    publish_batch(project, SETTINGS, audited)
    assert query(project, "select count(*), count(*) filter (n = -1) from t") == [(2900, 2000)]
    assert not [name for name in list_lake_files(project) if "keys" in name]


def test_what_was_set_aside_is_what_the_audits_found(tmp_path: Path):
    toml = '[table.t]\nquarantine_limit = "100%"\n[[audit]]\nname = "a"\ntable = "t"\nseverity = "quarantine"\n'
    project = write_project(tmp_path, source=SOURCE, toml=toml + 'sql = "from t where n < 5000"\n')
    audited = audit_sample(project, stage_batch(project))
    [aside] = audited.set_aside
    assert aside.file is not None
    audit_sample(project, audited.batch.id)  # another process looks at the same batch
    kept = aside.file.read_bytes()
    with duckdb.connect() as connection:  # as many rows, but others
        rows = f"select file, (row + 1) % 3000 as row, reason from '{aside.file}'"
        connection.execute(f"copy ({rows}) to '{aside.file}.new' (format parquet)")
    Path(f"{aside.file}.new").replace(aside.file)

    for changed in (aside.file.read_bytes(), kept[:-1], kept[:9] + b"?" + kept[10:], b""):
        aside.file.write_bytes(changed)
        with pytest.raises(PublishConflict, match="set aside is not what the audits found"):
            publish_batch(project, SETTINGS, audited)
    aside.file.unlink()
    with pytest.raises(PublishConflict, match="set aside is not what the audits found"):
        publish_batch(project, SETTINGS, audited)

    aside.file.write_bytes(kept)
    publish_batch(project, SETTINGS, audited)
    assert query(project, "select min(n) >= 5000 from t") == [(True,)]


def test_a_table_that_was_given_up_and_ends_after_the_audits_waits_for_the_next_batch(project: Project):
    publish_sample(project, SETTINGS, stage_batch(project))
    change_source(project.root, "update t set n = 0; insert into u values (2)")
    begin_batch(project, "b", ["t", "u"])
    extract_table(project, SETTINGS, batch="b", table="u")
    give_up_tables(project, "b", {"t": "it failed"})
    audited = audit_sample(project, "b")

    extract_table(project, SETTINGS, batch="b", table="t")
    publication = publish_batch(project, SETTINGS, audited)

    assert [table.name for table in publication.tables] == ["u"]
    assert query(project, "select max(n) > 0 from t") == [(True,)]
    assert query(project, "select count(*) from u") == [(2,)]


@pytest.mark.parametrize("is_removed", [True, False])
def test_a_table_that_is_extracted_again_after_the_audits_is_not_published_unaudited(
    project: Project, *, is_removed: bool
):
    audited = audit_sample(project, stage_batch(project, batch="b"))
    manifest = audited.batch.by_table["t"][0]
    [file] = staged_files(project, manifest)
    change_source(project.root, "update t set n = 0")
    if is_removed:
        file.unlink()
    else:  # somebody keeps the name and changes the file
        (batch_folder(project, "b") / "t" / "manifest.json").unlink()
    again = extract_table(project, SETTINGS, batch="b", table="t")
    if not is_removed:
        staged_files(project, again)[0].replace(file)

    with pytest.raises(PublishConflict, match='files of table "t" are not those that were audited'):
        publish_batch(project, SETTINGS, audited)

    with open_auditor(project, SETTINGS) as session:
        assert session.latest is None


def test_a_file_that_is_put_in_place_while_publishing_is_not_read(project: Project, monkeypatch: pytest.MonkeyPatch):
    audited = audit_sample(project, stage_batch(project))
    [file] = staged_files(project, audited.batch.by_table["t"][0])

    def change_then_apply(self: WarehouseSession, *args: Any) -> Any:
        fresh = file.with_name("other")
        with duckdb.connect() as connection:
            connection.execute(f"copy (select id, 0 as n, \"at\" from '{file}') to '{fresh}' (format parquet)")
        fresh.replace(file)
        return change(self, *args)

    change = WarehouseSession.change
    monkeypatch.setattr(WarehouseSession, "change", change_then_apply)
    publish_batch(project, SETTINGS, audited)

    assert query(project, "select max(n) > 0 from t") == [(True,)]


def test_what_failed_its_audits_cannot_be_published(tmp_path: Path):
    project = write_project(tmp_path, source=SOURCE, toml='[[audit]]\nname = "a"\nsql = "from t where n = 7919"\n')

    with pytest.raises(AuditFailed, match="1 row breaks a"):
        publish_batch(project, SETTINGS, audit_sample(project, stage_batch(project)))


class Counting:
    """A connection that counts the statements which contain one of some words."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, counts: Counter[str], words: tuple[str, ...]) -> None:
        self._connection, self._counts, self._words = connection, counts, words

    def execute(self, sql: str, *args: Any) -> Any:
        for word in self._words:
            self._counts[word] += word in sql
        self._counts["tables"] += args == (["lake", "main"],)
        return self._connection.execute(sql, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def count_reads(project: Project, batch: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str]]:
    """Finish *batch*; return how often files of staging were read, by name, and the statements by what they ask."""
    files: Counter[str] = Counter()
    statements: Counter[str] = Counter()
    read_text = Path.read_text
    words = ("duckdb_tables()", ".snapshots()")

    def read(path: Path, *args: Any, **kwargs: Any) -> str:
        if project.staging in path.parents:
            files[f"{path.parent.name}/{path.name}"] += 1
        return read_text(path, *args, **kwargs)

    def init(self: WarehouseSession, connection: duckdb.DuckDBPyConnection, *args: Any, **kwargs: Any) -> None:
        original(self, Counting(connection, statements, words), *args, **kwargs)  # type: ignore[arg-type]

    original = WarehouseSession.__init__
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read)
        patch.setattr(WarehouseSession, "__init__", init)
        finish_batch(project, SETTINGS, batch, logger=logging.getLogger("test"), read_runs=lambda _: [])
    return files, statements


@pytest.mark.parametrize("mode", ["full", "merge"])
def test_plan_manifests_and_the_list_of_tables_are_read_once_however_many_tables(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
):
    statements = []
    for number in (2, 5):
        root = tmp_path / str(number)
        root.mkdir()
        names = [f"t{index}" for index in range(number)]
        source = "".join(
            f"create table {name} (id integer primary key, at integer); insert into {name} values (1, 1);"
            for name in names
        )
        toml = "".join(f'[table.{name}]\nmode = "{mode}"\ncursor = "at"\n' for name in names) if mode == "merge" else ""
        project = write_project(root, source=source, toml=toml)
        publish_sample(project, SETTINGS, stage_batch(project))
        change_source(root, "".join(f"insert into {name} values (2, 2);" for name in names))
        batch = stage_batch(project)

        files, asked = count_reads(project, batch, monkeypatch)

        assert files[f"{batch}/batch.json"] == 1
        assert [files[f"{name}/manifest.json"] for name in names] == [1] * number
        statements.append(asked)
    assert statements[0] == statements[1]
    # Auditing and publishing each have a session; that of the publishing needs the list for increments alone.
    assert statements[0]["tables"] == (1 if mode == "full" else 2)
    assert statements[0]["duckdb_tables()"] <= 5  # with those of the quarantine and of the marts
    assert statements[0][".snapshots()"] <= 8


OWN = ["audit_bad_rows", "quarantine_rows", "quarantine_old", "quarantine_read", "found", "fresh", "touched t"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", ["full", "merge", "snapshot"])
def test_no_table_of_a_user_is_taken_for_one_of_the_session(tmp_path: Path, mode: str):
    with open_auditor(write_project(tmp_path, source=""), SETTINGS) as session:
        prefixed = session.name("bad rows").partition(".")[2].strip('"')
    names = [*OWN, prefixed, "lake", "_phasewise_found", "t"]
    source = "".join(
        f'create table "{name}" (id integer primary key, n integer, at integer); '
        f'insert into "{name}" values (1, {number}, 1), (2, {number}, 1);'
        for number, name in enumerate(names)
    )
    toml = "".join(
        f'[table."{name}"]\nkey = ["id"]\nquarantine = ["key"]\nquarantine_limit = 9\n'
        + (f'mode = "{mode}"\ncursor = "at"\ndeletes = true\n' if mode != "full" else "")
        + f'[[audit]]\nname = "a {name}"\ntable = "{name}"\nseverity = "quarantine"\n'
        f"sql = '''from \"{name}\" where n < 0'''\n"
        # Would find rows in any other table than its own.
        f'[[audit]]\nname = "own {name}"\ntable = "{name}"\n'
        f"sql = '''select id, n from \"{name}\" where n not in ({number}, 1000 + {number})'''\n"
        for number, name in enumerate(names)
    )
    marts = {f"m{number}": f'select sum(n)::bigint as n from "{name}" where n > 0' for number, name in enumerate(names)}
    project = write_project(tmp_path, source=source, toml=toml, marts=marts)
    publish_sample(project, SETTINGS, stage_batch(project))
    change_source(
        tmp_path,
        "".join(
            f'update "{name}" set n = 1000 + {number}, at = 2 where id = 1; delete from "{name}" where id = 2; '
            f'insert into "{name}" values (3, -1, 2);'
            for number, name in enumerate(names)
        ),
    )

    publish_sample(project, SETTINGS, stage_batch(project))

    current = " where is_current" if mode == "snapshot" else ""
    for number, name in enumerate(names):
        quoted = f'"{name}"'
        assert query(project, f"select id, n from lake.main.{quoted}{current}") == [(1, 1000 + number)], name
        assert query(project, f"select id, n from lake._quarantine.{quoted}") == [(3, -1)], name
        history = 1000 + number + (2 * number if mode == "snapshot" else 0)
        assert query(project, f"from lake.marts.m{number}") == [(history,)], name


def test_calls_out_of_order_are_mistakes(project: Project):
    audited = audit_sample(project, stage_batch(project))
    publication = publish_batch(project, SETTINGS, audited)
    with open_auditor(project, SETTINGS) as session:
        with pytest.raises(RuntimeError, match="opened tables; the call needs it showing"):
            run_audit(session, Audit(name="a", sql="select 1"))
        audit_batch(session, audited.batch)
        with pytest.raises(RuntimeError, match="needs it opened"):
            audit_batch(session, audited.batch)
        with pytest.raises(RuntimeError, match="only reads"), session.change(publication, "x"):
            pass
    with open_writer(project, SETTINGS) as session:
        with pytest.raises(RuntimeError, match="needs it changing"):
            session.sign(publication, "x")
        with (
            session.change(publication, "x"),
            pytest.raises(RuntimeError, match="needs it opened or showing"),
            session.change(publication, "y"),
        ):
            pass
