"""Which source serves a URL, which tables a project has, and what a source that others add must do."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from phasewise import sources
from phasewise.errors import ProjectError, SchemaDrift, SourceError
from phasewise.project.config import Project, Table, load_project
from phasewise.settings import Settings
from phasewise.sources import Column, SourceTable


class Memory:
    """A source with tables without rows."""

    extensions = ()
    url = "memory://"

    def __init__(self, *names: str, columns: tuple[Column, ...] = ()) -> None:
        self._tables = {name: SourceTable(name=name, columns=columns) for name in names}

    def check(self) -> None: ...

    def list_tables(self) -> list[str]:
        return sorted(self._tables)

    def describe_table(self, name: str) -> SourceTable:
        return self._tables[name]

    def can_carry(self, column: Column, type_name: str) -> bool:
        return type_name == "VARCHAR"


def make_project(root: Path, more: str = "", url: str = "memory://") -> Project:
    (root / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n{more}')
    return load_project(root)


def column(name: str, type_name: str = "BIGINT") -> Column:
    return Column(name=name, source_type=type_name.lower(), type=type_name, nullable=True)


@pytest.mark.parametrize("scheme", ["sqlite", "postgresql", "postgres", "mysql", "mariadb", "duckdb", "file"])
def test_every_built_in_scheme_has_a_source(tmp_path: Path, scheme: str):
    path = "h/db" if scheme.startswith(("p", "m")) else "/x"

    source = sources.open_source(make_project(tmp_path, url=f"{scheme}://{path}"), Settings())

    assert source.url == f"{scheme}://{path}"


def test_a_scheme_that_nobody_serves_is_refused_without_the_password(tmp_path: Path):
    project = make_project(tmp_path, url="oracle://scott:tiger@host/db")

    with pytest.raises(ProjectError, match="Known schemes: duckdb, file, .*sqlite") as caught:
        sources.open_source(project, Settings())

    assert "tiger" not in str(caught.value)


def test_a_package_adds_a_source_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry_point = metadata.EntryPoint(name="memory", value=f"{__name__}:Memory", group="phasewise.sources")
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: lambda url, root, settings: Memory("a", "b"))
    monkeypatch.setattr(metadata, "entry_points", lambda group, **names: metadata.EntryPoints([entry_point]))
    project = make_project(tmp_path)

    source = sources.open_source(project, Settings())

    assert sources.list_project_tables(project, source) == ["a", "b"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("", ["a", "b", "tmp_1"]),
        ('[tables]\nexclude = ["tmp_*"]', ["a", "b"]),
        ('[tables]\ninclude = ["a", "t*"]', ["a", "tmp_1"]),
        ('[tables]\ninclude = ["a", "a_view"]', ["a", "a_view"]),
        ("[table.gone]\n", ["a", "b", "gone", "tmp_1"]),
        ('[tables]\nexclude = ["*"]\n[table.gone]\n', []),
    ],
)
def test_globs_select_tables_and_named_ones_are_never_forgotten(tmp_path: Path, more: str, expected: list[str]):
    project = make_project(tmp_path, more)

    assert sources.list_project_tables(project, Memory("b", "a", "tmp_1")) == expected


def test_tables_that_differ_by_case_only_are_refused(tmp_path: Path):
    with pytest.raises(ProjectError, match='"People" and "people" differ by case only'):
        sources.list_project_tables(make_project(tmp_path), Memory("people", "other", "People"))


def test_a_contract_states_key_and_types_in_any_spelling():
    contract = Table(key=("id",), columns={"id": "int8", "name": "text"})
    table = SourceTable(name="t", columns=(column("id"), column("name", "DATE")))

    adapted = sources.apply_contract(Memory(), table, contract)

    assert adapted.key == ("id",)
    assert [(c.type, c.note) for c in adapted.columns] == [
        ("BIGINT", None),
        ("VARCHAR", "carried as VARCHAR because the contract says so; naturally DATE"),
    ]


def test_drift_names_every_column():
    contract = Table(key=("k",), columns={"id": "DATE", "gone": "DATE"})

    with pytest.raises(SchemaDrift, match=r'"id" is bigint .* not DATE; .*"gone" is missing; .*"k" is missing'):
        sources.apply_contract(Memory(), SourceTable(name="t", columns=(column("id"),)), contract)


@pytest.mark.parametrize(
    ("names", "problem"), [((), "no columns"), (("",), "name is empty"), (("A", "b", "a"), r"case only \(A, a\)")]
)
def test_a_table_that_the_lake_cannot_hold_is_refused(names: tuple[str, ...], problem: str):
    table = SourceTable(name="t", columns=tuple(map(column, names)))

    with pytest.raises(SourceError, match=problem):
        sources.apply_contract(Memory(), table, Table())


def test_a_project_without_tables_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources.contract, "open_source", lambda project, settings: Memory())

    problems = sources.check_project(make_project(tmp_path), Settings())

    assert ["selects no table" in str(problem) for problem in problems] == [True]


def test_the_reference_of_types_is_what_the_code_does():
    script = Path(__file__).resolve().parents[3] / "tools" / "write_types_reference.py"

    done = subprocess.run([sys.executable, str(script), "--check"], timeout=50, check=False)

    assert done.returncode == 0, "Run: python tools/write_types_reference.py"


def test_only_and_exclude_select_columns_by_name_and_by_pattern():
    table = SourceTable(name="t", columns=(column("a"), column("b1"), column("b2"), column("c")), key=("a",))

    selected = sources.apply_contract(Memory(), table, Table(only=("a", "b*"), exclude=("b2",)))

    assert [column.name for column in selected.columns] == ["a", "b1"]
    assert selected.key == ("a",)


def test_a_key_of_the_source_is_none_once_a_column_of_it_is_left_out():
    table = SourceTable(name="t", columns=(column("a"), column("b")), key=("a", "b"))

    assert sources.apply_contract(Memory(), table, Table(exclude=("b",))).key == ()


def test_a_column_that_is_wanted_alone_and_missing_is_drift():
    table = SourceTable(name="t", columns=(column("a"),))

    with pytest.raises(SchemaDrift, match='"b" is missing'):
        sources.apply_contract(Memory(), table, Table(only=("a", "b")))


def test_a_column_of_the_contract_or_key_cannot_be_left_out():
    table = SourceTable(name="t", columns=(column("a"), column("b"), column("c")))

    with pytest.raises(SchemaDrift, match='"b" is missing.*key column "a" is missing'):
        sources.apply_contract(Memory(), table, Table(key=("a",), columns={"b": "BIGINT"}, only=("c",)))


def test_conditions_are_anded_each_in_parentheses():
    table = SourceTable(name="t", columns=(column("a"),), conditions=("a = 1 or a = 2", "a > 0 -- so"))

    assert " ".join(table.where("b").split()) == "WHERE (a = 1 or a = 2 ) AND (a > 0 -- so ) AND (b )"
