"""The flows as plain calls: what is tried again, and what is not."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prefect.states import Failed

from phasewise import flows
from phasewise.errors import PhasewiseError, SchemaDrift, SourceUnavailable, TableMissing, UnfaithfulValue
from phasewise.staging.extract import extract_table


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "phasewise.toml").write_text('[project]\nname = "t"\n[source]\nurl = "sqlite:///source.db"\n')
    with closing(sqlite3.connect(tmp_path / "source.db")) as source, source:
        source.execute("CREATE TABLE player (id INTEGER PRIMARY KEY, name TEXT)")
    monkeypatch.setenv("PHASEWISE_PROJECT", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return tmp_path


def fail_first(monkeypatch: pytest.MonkeyPatch, error: PhasewiseError) -> list[str]:
    """Let the first extraction raise *error*; return the list in which each attempt is noted."""
    attempts: list[str] = []

    def extract(*args: Any, table: str, **options: Any) -> Any:
        attempts.append(table)
        if len(attempts) == 1:
            raise error
        return extract_table(*args, table=table, **options)

    monkeypatch.setattr(flows, "extract_table", extract)
    return attempts


def test_a_source_that_does_not_answer_is_asked_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = fail_first(monkeypatch, SourceUnavailable("The source does not answer."))

    done = flows.process_table_etl("player")

    assert done["status"] == "table_complete"
    assert attempts == ["player", "player"]


@pytest.mark.parametrize("kind", [TableMissing, SchemaDrift, UnfaithfulValue])
def test_what_no_retry_can_fix_fails_at_once(
    project: Path, monkeypatch: pytest.MonkeyPatch, kind: type[PhasewiseError]
) -> None:
    error = kind("No retry fixes this.")
    attempts = fail_first(monkeypatch, error)

    with pytest.raises(kind, match="No retry fixes this"):
        flows.process_table_etl("player")

    assert attempts == ["player"]
    decide = flows.sql_query_task.retry_condition_fn
    assert decide is not None
    assert not decide(flows.sql_query_task, None, Failed(data=error))
    assert decide(flows.sql_query_task, None, Failed(data=SourceUnavailable("It does not answer.")))
