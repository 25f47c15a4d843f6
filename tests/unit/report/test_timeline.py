"""The timeline: one row for each flow run, folded where there are many."""

from __future__ import annotations

from phasewise.report.records import TableReport
from phasewise.report.timeline import lay_out_timeline
from phasewise.report.write import render_report
from tests.unit.report.reports import TWO_PHASES, Page, at, make_report, make_run


def test_a_batch_without_runs_has_no_timeline() -> None:
    page = Page(render_report(make_report(status="renewed")))

    assert page.find("section", id="timeline") == []
    assert "audited again" in page.text


def test_a_run_of_several_attempts_is_drawn_as_one() -> None:
    runs = [make_run("t/1", 0, 90, attempts=2, seconds=3), make_run("t/2", 0, 2)]

    page = Page(render_report(make_report(runs=runs)))

    assert len(page.find("span", **{"class": "bar completed retried"})) == 1
    assert "2 attempts" in page.text
    assert "1 run had more than one attempt" in page.text


def test_a_large_fan_out_starts_folded_and_a_small_one_open() -> None:
    def count_open(tables: int) -> int:
        runs = [make_run(f"t/{number}", number, number + 2) for number in range(tables)]
        return len([one for one in Page(render_report(make_report(runs=runs))).find("details") if "open" in one])

    assert count_open(27) == 1
    assert count_open(200) == 0


def test_two_thousand_runs_and_five_hundred_tables_fit_one_page() -> None:
    runs = [
        make_run("main", 0, None),
        *(make_run(f"t/{one}", one / 9, one / 9 + 3, parent="main") for one in range(2000)),
    ]
    tables = [TableReport(name=f"t{one}", rows=one, size_bytes=one, seconds=one) for one in range(500)]

    html = render_report(make_report(runs=runs, tables=tables, ended_at=at(300)))

    assert len(html) < 4_000_000
    assert "2,001 flow runs" in html


def test_the_phases_of_a_step_are_rows_below_it() -> None:
    timeline = lay_out_timeline(make_report(runs=TWO_PHASES))

    load, publish = timeline.phases
    assert (load.name, publish.name) == ("load", "publish")
    a, b = load.rows
    assert (a.label, a.rows) == ("a", ())
    [tables] = b.rows
    assert (tables.label, tables.duration) == ("tables", "3.0 s")
    assert [row.label for row in tables.rows] == ["b × 2"]
