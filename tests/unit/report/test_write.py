"""A report on disk: whole or not at all, and read back as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from phasewise.errors import ReportError
from phasewise.report.records import BatchReport
from phasewise.report.write import write_report
from tests.unit.report.reports import SAMPLE, make_mart, make_report, read_report


@pytest.fixture(scope="module")
def sample() -> BatchReport:
    """A batch of the baseball example, as it was run: 27 tables, 33 flow runs, 126 audits, 9 marts."""
    return read_report(SAMPLE)


def test_the_data_of_a_report_reads_back_as_it_was(sample: BatchReport, tmp_path: Path) -> None:
    files = write_report(sample, tmp_path / "reports")

    assert read_report(files.json) == sample


def test_a_report_is_a_page_its_data_and_a_page_that_is_always_the_latest(sample: BatchReport, tmp_path: Path) -> None:
    write_report(replace(sample, batch="earlier"), tmp_path)

    files = write_report(sample, tmp_path)

    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{sample.batch}.html", f"{sample.batch}.json", "earlier.html", "earlier.json", "latest.html"}
    assert files.latest.read_bytes() == files.html.read_bytes()


def test_a_write_that_fails_leaves_no_half_of_a_page(sample: BatchReport, tmp_path: Path) -> None:
    (tmp_path / f"{sample.batch}.html").mkdir()

    with pytest.raises(ReportError, match=r"could not be written to .*run final-etl-job without"):
        write_report(sample, tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {f"{sample.batch}.html", f"{sample.batch}.json"}


def test_a_batch_cannot_be_written_outside_its_folder(tmp_path: Path) -> None:
    files = write_report(make_report(batch="../../é v/1"), tmp_path / "reports")

    assert files.html == tmp_path / "reports" / "-..---v-1.html"
    assert files.html.is_file()


def test_json_holds_what_json_has_no_form_for_as_text(tmp_path: Path) -> None:
    row = [float("nan"), float("-inf"), Decimal("1.10"), date(2026, 1, 3), b"\x00\xff", "\udc80", 2**70]
    mart = make_mart([f"c{number}" for number in range(7)], [row])

    files = write_report(make_report(marts=[mart]), tmp_path)

    (written,) = json.loads(files.json.read_text("utf-8"))["marts"][0]["rows"]
    assert written == ["NaN", "-Infinity", "1.10", "2026-01-03", "00ff", "\udc80", 2**70]
