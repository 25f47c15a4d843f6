from __future__ import annotations

from pathlib import Path

import pytest

from phasewise.errors import ProjectError, ProjectNotFound, UnknownTable
from phasewise.project.config import find_project, load_project, resolve_table
from phasewise.project.urls import redact_url
from phasewise.settings import Settings

MINIMAL = '[project]\nname = "shop"\n\n[source]\nurl = "sqlite:///shop.db"\n'


def write(folder: Path, text: str) -> Path:
    (folder / "phasewise.toml").write_text(text, encoding="utf-8")
    return folder


def test_a_minimal_project_has_defaults_for_the_rest(tmp_path: Path) -> None:
    project = load_project(write(tmp_path, MINIMAL))

    assert project.name == "shop"
    assert project.warehouse == tmp_path / "warehouse"
    assert project.staging.parent == tmp_path / ".phasewise"
    assert project.find_table("anything").key == ()


@pytest.mark.parametrize("name", ["history", "snapshot"])
def test_the_mode_history_may_have_its_old_name(tmp_path: Path, name: str) -> None:
    project = load_project(write(tmp_path, MINIMAL + f'\n[table.orders]\nmode = "{name}"\n'))

    assert project.find_table("orders").mode == "history"


def test_another_mode_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + '\n[table.orders]\nmode = "histroy"\n')

    with pytest.raises(ProjectError, match="'full', 'append', 'merge' or 'history'"):
        load_project(tmp_path)


def test_a_folder_without_phasewise_toml_says_what_to_create(tmp_path: Path) -> None:
    with pytest.raises(ProjectNotFound, match=r"There is no phasewise\.toml in .*Create one"):
        load_project(tmp_path)


def test_malformed_toml_names_the_file_and_the_line(tmp_path: Path) -> None:
    write(tmp_path, '[project]\nname = "shop\n')

    with pytest.raises(ProjectError, match=r"phasewise\.toml is not valid TOML.*line 2"):
        load_project(tmp_path)


@pytest.mark.parametrize(
    ("text", "line", "key", "nearest"),
    [
        (MINIMAL + '\n[warehouse]\npaht = "w"\n', 8, "warehouse.paht", "path"),
        (MINIMAL + '\n[wharehouse]\npath = "w"\n', 7, "wharehouse", "warehouse"),
        (MINIMAL + '\n[table.orders]\nkeys = ["id"]\n', 8, "table.orders.keys", "key"),
        (
            MINIMAL + '\n[[audit]]\nname = "a"\nsql = "select 1"\nseverty = "warning"\n',
            10,
            "audit.0.severty",
            "severity",
        ),
        ('[project]\nname = "shop"\nurl = "x"\n[source]\nurl = "sqlite:///a"\n', 3, "project.url", None),
    ],
)
def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_known_one(
    tmp_path: Path, text: str, line: int, key: str, nearest: str | None
) -> None:
    write(tmp_path, text)

    with pytest.raises(ProjectError) as caught:
        load_project(tmp_path)

    message = str(caught.value)
    assert f'phasewise.toml:{line}: unknown key "{key}"' in message
    assert nearest is None or f'Did you mean "{nearest}"?' in message


def test_a_value_of_the_wrong_type_is_named_by_line_and_key(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + '\n[table.orders]\nkey = "id"\n')

    with pytest.raises(ProjectError, match=r'phasewise\.toml:8: key "table\.orders\.key"'):
        load_project(tmp_path)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    write(tmp_path, '[project]\nname = "shop"\n')

    with pytest.raises(ProjectError, match='the key "source" is missing'):
        load_project(tmp_path)


def test_a_password_comes_from_the_environment_and_never_stands_in_a_repr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_PASSWORD", "s3cret")
    url = "postgresql://etl:${SHOP_PASSWORD}@db.example:5432/shop"
    write(tmp_path, MINIMAL.replace("sqlite:///shop.db", url))

    project = load_project(tmp_path)

    assert project.source.url == "postgresql://etl:s3cret@db.example:5432/shop"
    assert "s3cret" not in repr(project)


def test_a_missing_environment_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOP_PASSWORD", raising=False)
    write(tmp_path, MINIMAL.replace("sqlite:///shop.db", "postgresql://etl:${SHOP_PASSWORD}@db.example/shop"))

    with pytest.raises(ProjectError, match="SHOP_PASSWORD, which is not set"):
        load_project(tmp_path)


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("postgresql://etl:s3cret@db:5432/shop", "postgresql://etl:***@db:5432/shop"),
        ("postgresql://etl:s3%40c:ret@db/shop?sslmode=require", "postgresql://etl:***@db/shop?sslmode=require"),
        ("mysql://db/shop?user=etl&password=s3cret", "mysql://db/shop?user=etl&password=***"),
        ("sqlite:///data/shop.db", "sqlite:///data/shop.db"),
        ("sqlite:////var/shop.db", "sqlite:////var/shop.db"),
        ("sqlite:///data/a:b@c.db", "sqlite:///data/a:b@c.db"),
        ("postgresql://etl:s3/cret@db/shop", "postgresql://etl:***@db/shop"),
        ("postgresql://etl:s3#cret@db:5432/shop", "postgresql://etl:***@db:5432/shop"),
        ("postgresql://etl:12?cret@db/shop?sslmode=require", "postgresql://etl:***@db/shop?sslmode=require"),
        ("postgresql://etl:a@b/cret@db/shop", "postgresql://etl:***@db/shop"),
    ],
)
def test_a_redacted_url_has_no_password(url: str, redacted: str) -> None:
    assert redact_url(url) == redacted


def test_marts_are_read_with_their_charts_from_the_folder(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    (tmp_path / "marts").mkdir()
    (tmp_path / "marts" / "top_orders.sql").write_text(
        "-- title: The largest orders\n-- chart: line\n-- x: day\n-- y: total\nselect 1 as day, 2 as total\n"
    )

    [mart] = load_project(tmp_path).marts

    assert (mart.name, mart.title, mart.chart, mart.x, mart.y) == (
        "top_orders",
        "The largest orders",
        "line",
        "day",
        "total",
    )


def test_a_mart_with_an_unknown_chart_is_refused(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    (tmp_path / "marts").mkdir()
    (tmp_path / "marts" / "pie.sql").write_text("-- chart: pie\nselect 1\n")

    with pytest.raises(ProjectError, match=r'pie\.sql: the header "chart"'):
        load_project(tmp_path)


def test_two_audits_with_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + '\n[[audit]]\nname = "a"\nsql = "select 1"\n' * 2)

    with pytest.raises(ProjectError, match="two audits have the name 'a'"):
        load_project(tmp_path)


def test_the_nearest_project_above_the_current_folder_is_found(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    below = tmp_path / "marts" / "drafts"
    below.mkdir(parents=True)

    assert find_project(Settings(project=None), start=below) == tmp_path


def test_the_setting_wins_over_the_current_folder(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    other = tmp_path / "other"

    assert find_project(Settings(project=other), start=tmp_path) == other


def test_a_table_is_found_by_its_name_in_any_case_if_only_one_fits() -> None:
    assert resolve_table("Batting", ["batting", "people"]) == "batting"
    assert resolve_table("Orders", ["Orders", "orders"]) == "Orders"


def test_an_unknown_table_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(UnknownTable, match='no table "bating".*Did you mean "batting"'):
        resolve_table("bating", ["batting", "people"])
