"""The page: whole, escaped, and without a network."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace

import pytest

from phasewise.report.records import AuditReport, BatchReport, MartReport, TableReport
from phasewise.report.write import render_report
from tests.unit.report.reports import SAMPLE, TWO_PHASES, Page, make_report, make_run, read_report


@pytest.fixture(scope="module")
def sample() -> BatchReport:
    """A batch of the baseball example, as it was run: 27 tables, 33 flow runs, 126 audits, 9 marts."""
    return read_report(SAMPLE)


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
