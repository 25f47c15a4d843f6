"""What the report says of a table that was staged in parts, and of the moments at which tables were read."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from phasewise.report.from_batch import BatchData, describe_moments, write_batch_report
from phasewise.sources import Column
from phasewise.staging.manifest import Manifest
from phasewise.testing.projects import write_project

AT = datetime(2024, 1, 1, tzinfo=UTC)


def manifest(
    table: str, *, partition: str | None = None, rows: int = 1, snapshot: str | None = "moment", note: str | None = None
) -> Manifest:
    return Manifest(
        batch="b1",
        table=table,
        partition=partition,
        rows=rows,
        size_bytes=10,
        source_rows=rows,
        columns=(Column(name="a", source_type="INTEGER", type="BIGINT", nullable=True),),
        key=(),
        files=(),
        started_at=AT,
        ended_at=AT,
        source="sqlite:///source.sqlite",
        snapshot=snapshot,
        snapshot_note=note,
    )


def test_the_partitions_of_a_table_are_one_table_with_their_smallest_and_largest(tmp_path: Path):
    project = write_project(tmp_path, source="create table orders (a integer);")
    parts = [manifest("orders", partition=f"{number}/2", rows=1000 + number) for number in (1, 2)]

    data = BatchData(project=project, batch="b1", manifests=[*parts, manifest("stock")])
    files = write_batch_report(data)

    orders, stock = json.loads(files.json.read_text())["tables"]
    assert (orders["name"], orders["rows"], orders["size_bytes"]) == ("orders", 2003, 20)
    assert orders["notes"] == ["staged in 2 partitions of 1,001 to 1,002 rows"]
    assert stock["notes"] == []


def test_a_table_that_could_not_be_split_says_so(tmp_path: Path):
    project = write_project(tmp_path, source="create table orders (a integer);")
    whole = replace(manifest("orders"), split_note="staged whole, as it could not be split: out of luck")

    files = write_batch_report(BatchData(project=project, batch="b1", manifests=[whole]))

    assert json.loads(files.json.read_text())["tables"][0]["notes"] == [whole.split_note]


def test_one_moment_is_nothing_to_remark():
    assert describe_moments([manifest("a"), manifest("b")]) == ""
    assert describe_moments([manifest("a", snapshot=None)]) == ""


def test_tables_of_several_moments_are_said_to_be_so():
    assert "not read at one moment" in describe_moments([manifest("a"), manifest("b", snapshot="later")])


def test_partitions_without_a_moment_are_named():
    parts = [manifest("orders", partition=f"{number}/2", snapshot=None) for number in (1, 2)]

    message = describe_moments([*parts, manifest("stock", snapshot=None)])

    assert message.endswith("but for those whose partitions were read one after another: orders.")


@pytest.mark.parametrize(
    ("moments", "marked"),
    [
        ({"a": "s1", "b": "s1"}, {}),
        ({"a": "s1", "b": "s1", "c": "s2"}, {"c": ""}),
        ({"a": "s1", "b": None}, {"b": " (why)"}),
        ({"a": None, "b": None}, {"a": " (why)", "b": " (why)"}),
        ({"a": None}, {}),
    ],
)
def test_a_table_that_shows_another_moment_is_marked(
    tmp_path: Path, moments: dict[str, str | None], marked: dict[str, str]
):
    project = write_project(tmp_path, source="")
    manifests = [manifest(table, snapshot=moment, note=None if moment else "why") for table, moment in moments.items()]

    files = write_batch_report(BatchData(project=project, batch="b1", manifests=manifests))

    start = "not read at the moment of the other tables, so it may not be consistent with them"
    assert {table["name"]: table["notes"] for table in json.loads(files.json.read_text())["tables"]} == {
        table: [start + marked[table]] if table in marked else [] for table in moments
    }
