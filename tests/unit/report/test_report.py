"""The report: what the clock says, what the charts show, and a page that is whole, escaped and needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phasewise.errors import ReportError
from phasewise.outcomes import StepOutcome
from phasewise.report import (
    AuditReport,
    BatchReport,
    MartReport,
    RunSpan,
    TableReport,
    read_report,
    render_report,
    write_report,
)
from phasewise.report.charts import draw_chart, plan_chart
from phasewise.report.figures import (
    format_bytes,
    format_seconds,
    format_tick,
    humanise,
    nice_ticks,
    time_ticks,
    to_moment,
)
from phasewise.report.timeline import lay_out_timeline
from phasewise.report.timing import (
    build_tree,
    count_parallel,
    find_critical_chain,
    find_phases,
    measure_time_saved,
)

SAMPLE = Path(__file__).parents[2] / "data" / "report.json"
#: A busy machine is no reason to fail.
PATIENTLY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
START = datetime(2026, 1, 3, 2, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def sample() -> BatchReport:
    """A batch of the baseball example, as it was run: 27 tables, 33 flow runs, 126 audits, 9 marts."""
    return read_report(SAMPLE)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def make_run(name: str, start: float | None, end: float | None, **fields: Any) -> RunSpan:
    values: dict[str, Any] = {
        "name": name,
        "flow": name.partition("/")[0],
        "run_id": name,
        "state": "Completed",
        "started_at": None if start is None else at(start),
        "ended_at": None if end is None else at(end),
    }
    return RunSpan(**(values | fields))


def make_report(**fields: Any) -> BatchReport:
    values: dict[str, Any] = {
        "project": "shop",
        "batch": "b1",
        "status": "published",
        "started_at": START,
        "ended_at": at(10),
    }
    return BatchReport(**(values | fields))


def make_mart(columns: list[str], rows: list[list[Any]], **fields: Any) -> MartReport:
    return MartReport(name="mart", title="Mart", columns=columns, rows=rows, **fields)


#: Phase load: a (1 s) next to b, which triggers b/1 and b/2 (3 s and 2 s); phase publish: c (4 s).
TWO_PHASES = (
    make_run("main", 0, 10),
    make_run("a", 0.5, 1.5, parent="main", phase="load", expected_start=at(0)),
    make_run("b", 0.5, 5, parent="main", phase="load"),
    make_run("b/1", 1, 4, parent="b", phase="tables"),
    make_run("b/2", 1, 3, parent="b", phase="tables"),
    make_run("c", 6, 10, parent="main", phase="publish", expected_start=at(5)),
)


class Page(HTMLParser):
    """The text, the tags and the attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._skip = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skip = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._skip = False

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.text += re.sub(r"\s+", " ", data)

    def find(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]


# ── What the clock says


def test_a_step_is_a_run_that_triggered_no_other() -> None:
    saved = measure_time_saved(TWO_PHASES, at(10))

    assert [run.name for run in saved.steps] == ["a", "b/1", "b/2", "c"]
    assert saved.steps_seconds == 1 + 3 + 2 + 4


def test_the_clock_of_a_phase_has_the_wait_for_its_first_run_in_it() -> None:
    saved = measure_time_saved(TWO_PHASES, at(10))

    assert [phase.seconds for phase in saved.phases] == [5, 5]
    assert saved.wall_seconds == 10
    assert saved.factor == 1.0


def test_a_run_without_an_end_counts_until_the_report_was_written() -> None:
    runs = [make_run("main", 0, None), make_run("only", 1, None, parent="main", state="Running")]

    assert measure_time_saved(runs, at(7)).steps_seconds == 6


def test_a_run_that_never_started_counts_for_nothing_and_is_mentioned() -> None:
    runs = [*TWO_PHASES, make_run("d", None, None, parent="main", state="Scheduled")]

    saved = measure_time_saved(runs, at(10))

    assert (saved.left_out, saved.steps_seconds) == (1, 10)


def test_a_retried_run_counts_its_attempts_and_not_the_pause_between_them() -> None:
    runs = [make_run("main", 0, 100), make_run("t", 0, 100, parent="main", seconds=7.5, attempts=2)]

    saved = measure_time_saved(runs, at(100))

    assert (saved.steps_seconds, saved.wall_seconds, saved.retried) == (7.5, 100, 1)


def test_nothing_ran_means_no_factor() -> None:
    assert measure_time_saved([], at(1)).factor is None
    assert measure_time_saved([make_run("a", None, None)], at(1)).factor is None


def test_an_end_before_the_start_counts_as_no_time() -> None:
    assert measure_time_saved([make_run("a", 5, 4)], at(10)).steps_seconds == 0


def test_phases_have_the_names_that_the_pipeline_declares() -> None:
    phases = find_phases(build_tree(TWO_PHASES), at(10))

    named = [(phase.name, [node.run.name for node in phase.nodes]) for phase in phases]
    assert named == [("load", ["a", "b"]), ("publish", ["c"])]


def test_steps_that_wait_for_each_others_slot_are_still_one_phase() -> None:
    # With one slot pre, sub and final start one after another: by the clock they would be three phases.
    runs = [
        make_run("main", 0, 9),
        make_run("pre", 1, 2, parent="main", phase="load"),
        make_run("sub", 3, 5, parent="main", phase="load"),
        make_run("final", 6, 8, parent="main", phase="publish"),
    ]

    phases = find_phases(build_tree(runs), at(9))

    assert [(phase.name, phase.seconds) for phase in phases] == [("load", 4), ("publish", 2)]


def test_runs_that_no_pipeline_declares_are_together() -> None:
    runs = [
        make_run("main", 0, 9),
        make_run("a", 0, 2, parent="main"),
        make_run("b", 3, 9, parent="main"),
        make_run("c", 3, 4, parent="main", phase="publish"),
    ]

    assert [phase.name for phase in find_phases(build_tree(runs), at(9))] == ["Runs", "publish"]


def test_the_phases_of_a_step_are_rows_below_it() -> None:
    timeline = lay_out_timeline(make_report(runs=TWO_PHASES))

    load, publish = timeline.phases
    assert (load.name, publish.name) == ("load", "publish")
    a, b = load.rows
    assert (a.label, a.rows) == ("a", ())
    [tables] = b.rows
    assert (tables.label, tables.duration) == ("tables", "3.0 s")
    assert [row.label for row in tables.rows] == ["b × 2"]


def test_a_parent_is_found_by_id_or_by_name() -> None:
    by_name = make_run("child", 0, 1, parent="parent")
    by_id = make_run("child 2", 0, 1, parent="id-1")
    parent = make_run("parent", 0, 1, run_id="id-1")

    (root,) = build_tree([by_name, by_id, parent])

    assert [node.run.name for node in root.children] == ["child", "child 2"]


@given(st.lists(st.integers(min_value=-1, max_value=7), max_size=8))
@PATIENTLY
def test_whatever_the_parents_each_run_is_in_the_tree_once(parents: list[int]) -> None:
    runs = [make_run(str(number), 0, 1, parent=str(parent)) for number, parent in enumerate(parents)]

    found = [node.run.name for root in build_tree(runs) for node in root.walk()]

    assert sorted(found) == sorted(run.name for run in runs)


def test_the_critical_chain_leads_back_from_the_last_step() -> None:
    chain = find_critical_chain(build_tree(TWO_PHASES), at(10))

    assert chain == {"c", "b/1"}


def test_the_critical_chain_follows_the_slot_that_a_run_waited_for() -> None:
    runs = [make_run("x/1", 0, 2), make_run("x/2", 0, 3), make_run("x/3", 2, 6), make_run("x/4", 3, 4)]

    assert find_critical_chain(build_tree(runs), at(6)) == {"x/1", "x/3"}


def test_a_run_beside_the_branch_of_another_is_not_in_its_chain() -> None:
    runs = [
        make_run("main", 0, 9),
        make_run("a", 0, 1, parent="main"),
        make_run("b", 0, 9, parent="main"),
        make_run("b/1", 2, 5, parent="b"),
        make_run("b/2", 6, 9, parent="b"),
    ]

    assert find_critical_chain(build_tree(runs), at(9)) == {"b/1", "b/2"}


def test_runs_side_by_side_have_no_critical_chain() -> None:
    runs = [make_run("a", 0, 2), make_run("b", 1, 3)]

    assert find_critical_chain(build_tree(runs), at(3)) == frozenset()


def test_a_run_that_starts_when_another_ends_does_not_run_beside_it() -> None:
    steps = count_parallel([make_run("a", 0, 2), make_run("b", 1, 3), make_run("c", 2, 4)], at(4))

    assert steps == ((at(0), 1), (at(1), 2), (at(2), 2), (at(3), 1), (at(4), 0))


# ── What the charts show


def test_text_is_drawn_as_bars_in_the_order_of_the_rows() -> None:
    chart = plan_chart(make_mart(["player", "hits"], [["Rose", 4256], ["Cobb", 4189]]))

    assert chart is not None
    assert chart.kind == "bars"
    assert [(point.label, point.y) for point in chart.points] == [("Rose", 4256), ("Cobb", 4189)]


def test_bars_by_year_are_columns_on_a_clock() -> None:
    chart = plan_chart(make_mart(["year", "players"], [[1936, 5], [1937, 3], [1939, 4]]))

    assert chart is not None
    assert (chart.kind, chart.x_is) == ("columns", "year")
    assert "1,936" not in draw_chart(chart, 520).svg


def test_a_line_that_would_zigzag_is_drawn_as_points() -> None:
    rows = [[2000, 1], [2000, 2], [2001, 3]]

    chart = plan_chart(make_mart(["year", "pay"], rows, chart="line"))

    assert chart is not None
    assert chart.kind == "scatter"


def test_a_line_is_drawn_from_left_to_right_whatever_the_order_of_the_rows() -> None:
    chart = plan_chart(make_mart(["day", "n"], [["2026-01-02", 2], ["2026-01-01", 1]], chart="line"))

    assert chart is not None
    assert (chart.kind, chart.x_is, [point.y for point in chart.points]) == ("line", "time", [1, 2])


def test_the_named_columns_are_drawn_whatever_their_case() -> None:
    chart = plan_chart(make_mart(["a", "B", "c"], [["x", 1, 2]], x="A", y="C"))

    assert chart is not None
    assert (chart.x_label, chart.y_label) == ("a", "c")


def test_a_chart_counts_what_it_leaves_out() -> None:
    rows: list[list[Any]] = [[f"player {number}", number] for number in range(30)]
    rows += [["unknown", None], ["impossible", float("nan")]]

    chart = plan_chart(make_mart(["player", "hits"], rows, total_rows=500))

    assert chart is not None
    assert (len(chart.points), chart.left_out) == (25, 475)


@pytest.mark.parametrize(
    ("columns", "rows"),
    [([], []), (["a"], []), (["a"], [["x"]]), (["a", "b"], [["x", "y"]]), (["a", "b"], [["x", None]])],
)
def test_a_mart_without_numbers_has_no_chart(columns: list[str], rows: list[list[Any]]) -> None:
    assert plan_chart(make_mart(columns, rows)) is None


def test_decimals_are_drawn() -> None:
    assert plan_chart(make_mart(["x", "y"], [["a", Decimal("1.50")]])) is not None


def test_labels_of_bars_have_the_same_decimals() -> None:
    chart = plan_chart(make_mart(["pitcher", "era"], [["a", 2.35], ["b", 2.391], ["c", 12.0]]))

    assert chart is not None
    svg = draw_chart(chart, 520).svg
    assert all(f">{label}<" in svg for label in ("2.350", "2.391", "12.000"))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.decimals(),
    st.text(max_size=40),
    st.dates(),
    st.datetimes(),
    st.sampled_from([1936, 2024, "2024-01-01", "0001-01-01T00:00:00+14:00", "2024-13-01", 10**400, -0.0, 5e-324]),
)


@given(
    rows=st.lists(st.lists(VALUES, min_size=1, max_size=3), max_size=12),
    chart=st.sampled_from(["bar", "line", "scatter"]),
    names=st.tuples(st.text(max_size=20), st.text(max_size=20)),
)
@settings(PATIENTLY, max_examples=300)
def test_no_data_breaks_a_chart_or_leaves_it_with_a_place_that_is_not_a_number(
    rows: list[list[Any]], chart: Any, names: tuple[str, str]
) -> None:
    planned = plan_chart(make_mart([*names], rows, chart=chart))

    for width in (520, 320) if planned else ():
        svg = draw_chart(planned, width).svg
        places = re.findall(r' (?:x|y|cx|cy|x1|y1|x2|y2|width|height|d)="([^"]*)"', svg)
        assert not [place for place in places if re.search(r"nan|inf", place)]


# ── Figures


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0853, "85 ms"),
        (0.0999, "0.10 s"),
        (0.5, "0.50 s"),
        (0.999, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (4800, "1 h 20 min"),
        (-2, "−2.0 s"),
    ],
)
def test_seconds_have_the_unit_that_fits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_500, "100 kB"), (999_600, "1.0 MB"), (14_200_000, "14.2 MB")],
)
def test_bytes_are_in_decimal_units(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_a_tick_has_the_decimals_that_its_step_needs() -> None:
    assert format_tick(0.25, 0.25, 1) == "0.25"
    assert format_tick(5000, 1000, 9000) == "5,000"
    assert format_tick(500_000, 500_000, 2_000_000) == "0.5M"
    assert format_tick(0, 500_000, 2_000_000) == "0"
    assert float(format_tick(2e-310, 1e-310, 5e-310)) == 0  # nearer to 0 than any power of ten that is a float


# A step cannot be divided out of numbers that a float holds with a few bits only.
_MEASURES = st.floats(-1e299, 1e299, allow_subnormal=False)


@given(_MEASURES, _MEASURES, st.integers(2, 10))
@PATIENTLY
def test_ticks_enclose_what_they_measure(one: float, other: float, count: int) -> None:
    low, high = sorted((one, other))

    ticks = nice_ticks(low, high, count)

    unseen = (high - low) * 1e-12
    assert ticks[0] <= low + unseen
    assert ticks[-1] >= high - unseen
    assert 2 <= len(ticks) <= 4 * count + 1


@pytest.mark.parametrize("seconds", [0.001, 0.4, 9, 61, 700, 5_000, 90_000, 2_000_000])
def test_the_axis_of_a_batch_has_few_ticks_whatever_its_length(seconds: float) -> None:
    assert 1 <= len(time_ticks(seconds, 8)) <= 9


def test_a_unit_at_the_end_of_a_column_name_is_shown_as_one() -> None:
    assert humanise("payroll_usd") == "payroll (USD)"
    assert humanise("home_runs") == "home runs"
    assert humanise("usd") == "usd"


def test_only_text_of_a_date_is_a_moment() -> None:
    assert to_moment("2026-01-03") == to_moment(date(2026, 1, 3))
    assert to_moment("2026-13-03") is None
    assert to_moment("12345678901") is None


# ── Files


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


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"version": 99}', '{"version": 1, "project": 3}'])
def test_what_is_not_a_report_is_refused_by_name(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(ReportError, match=r"r\.json cannot be read as a report"):
        read_report(path)


def test_json_holds_what_json_has_no_form_for_as_text(tmp_path: Path) -> None:
    row = [float("nan"), float("-inf"), Decimal("1.10"), date(2026, 1, 3), b"\x00\xff", "\udc80", 2**70]
    mart = make_mart([f"c{number}" for number in range(7)], [row])

    files = write_report(make_report(marts=[mart]), tmp_path)

    (written,) = json.loads(files.json.read_text("utf-8"))["marts"][0]["rows"]
    assert written == ["NaN", "-Infinity", "1.10", "2026-01-03", "00ff", "\udc80", 2**70]


def test_naive_times_are_taken_for_utc() -> None:
    run = make_run("a", 0, 1, started_at=datetime(2026, 1, 3, 2))

    assert run.started_at == START


def test_what_the_server_told_becomes_a_span() -> None:
    outcome = StepOutcome(
        name="process-table-etl/batting",
        run_id="1",
        state_type="FAILED",
        state_name="TimedOut",
        started_at=at(1),
        ended_at=at(3),
        parent_id="0",
    )

    span = RunSpan.from_outcome(outcome)

    assert (span.flow, span.parent, span.kind) == ("process-table-etl", "0", "failed")


# ── The page


def test_the_page_says_what_was_published(sample: BatchReport) -> None:
    text = Page(render_report(sample)).text

    for fact in ("27 tables were published as snapshot 1", "636,659", "33 flow runs", "124 of 126 audits passed"):
        assert fact in text
    for title in ("Time saved", "Timeline", "Tables", "Audits", "Marts", "About this batch"):
        assert title in text
    assert all(table.name in text for table in sample.tables)
    assert all(mart.title in text for mart in sample.marts)
    assert sample.source in text


def test_the_page_needs_no_network(sample: BatchReport) -> None:
    page = Page(render_report(sample))

    loading = [
        (tag, attributes)
        for tag, attributes in page.tags
        if tag in ("img", "iframe", "object", "embed", "source", "base")
        or "src" in attributes
        or "srcset" in attributes
    ]
    assert loading == []
    assert [link["href"].startswith("data:") for link in page.find("link") if link["href"]] == [True]
    style = re.search(r"<style>(.*?)</style>", render_report(sample), re.DOTALL)
    assert style is not None
    assert not re.search(r"url\(|@import", style[1])


def test_only_the_script_of_the_page_may_run(sample: BatchReport) -> None:
    html = render_report(sample)

    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    (policy,) = Page(html).find("meta", **{"http-equiv": "Content-Security-Policy"})
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in str(policy["content"])
    assert "default-src 'none'" in str(policy["content"])


HOSTILE = """</style></script><script>alert(1)</script>" onload='x' {{ 7 * 7 }} 🐘 &amp; \u202e"""


def test_no_name_or_value_becomes_part_of_the_page() -> None:
    run = make_run(f"process-table-etl/{HOSTILE}", 0, 1, url=f"http://x/{HOSTILE}", phase=HOSTILE)
    report = make_report(
        project=HOSTILE,
        batch=HOSTILE,
        message=HOSTILE,
        source=HOSTILE,
        versions={HOSTILE: HOSTILE},
        runs=[run, replace(run, run_id="2", state=HOSTILE), make_run(HOSTILE, 0, 1, flow=HOSTILE, state="Failed")],
        tables=[TableReport(name=HOSTILE, rows=1, size_bytes=1, seconds=1, status=HOSTILE, notes=[HOSTILE])],
        audits=[
            AuditReport(
                name=HOSTILE,
                table=HOSTILE,
                severity="blocking",
                passed=False,
                bad_rows=2,
                columns=[HOSTILE],
                sample=[[HOSTILE]],
                message=HOSTILE,
            )
        ],
        marts=[
            MartReport(name=HOSTILE, title=HOSTILE, columns=[HOSTILE, "n"], rows=[[HOSTILE, 1]]),
            MartReport(name=HOSTILE, title="", columns=["x", HOSTILE], rows=[[1, 1], [2, 2]], chart="line"),
        ],
    )

    page = Page(render_report(report))

    assert len(page.find("script")) == 1
    assert not [attributes for _, attributes in page.tags if "onload" in attributes]
    assert "{{ 7 * 7 }}" in page.text
    assert HOSTILE in page.text


def test_a_link_leads_to_the_web_or_is_none() -> None:
    runs = [make_run("a", 0, 1, url="javascript:alert(1)"), make_run("b", 2, 3, url="https://prefect/run/b")]

    links = [link["href"] for link in Page(render_report(make_report(runs=runs))).find("a")]

    assert "https://prefect/run/b" in links
    assert not [link for link in links if link and link.startswith("javascript")]


def test_a_failed_batch_says_that_nothing_was_published_and_what_failed() -> None:
    audits = [
        AuditReport(name="late", table=None, severity="warning", passed=False),
        AuditReport(
            name="key", table="batting", severity="blocking", passed=False, bad_rows=3, columns=["id"], sample=[[7]]
        ),
        AuditReport(name="fine", table=None, severity="blocking", passed=True),
    ]
    runs = [make_run("main", 0, None), make_run("t/1", 0, 1, parent="main", state="Crashed")]

    text = Page(render_report(make_report(status="failed", message="It broke.", audits=audits, runs=runs))).text

    assert "Nothing of this batch was published" in text
    assert "It broke." in text
    assert "Crashed t/1" in text
    assert "1 of 3 audits passed, 1 blocking failed, 1 warning" in text
    assert text.index("3 bad rows") < text.index("late") < text.index("fine")


def test_a_table_that_was_kept_is_said_to_be_its_last_good_version() -> None:
    tables = [TableReport(name="batting", rows=1, size_bytes=1, seconds=0, status="kept")]

    assert "kept: last good version" in Page(render_report(make_report(tables=tables))).text


def test_no_time_saved_is_said_as_plainly_as_time_saved() -> None:
    text = Page(render_report(make_report(runs=TWO_PHASES))).text

    assert "No time was saved: 10 s of work took 10 s by the clock" in text


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
