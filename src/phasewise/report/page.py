"""The page: a report's records laid out, and rendered as one HTML document that needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from phasewise.report.charts import Chart, draw_chart, plan_chart, strip_tips
from phasewise.report.figures import format_bytes, format_moment, format_seconds, format_value, is_number
from phasewise.report.records import AuditReport, BatchReport, MartReport, RunSpan
from phasewise.report.timeline import lay_out_timeline
from phasewise.report.timing import measure_time_saved, run_seconds, seconds_between

#: Rows of a mart on the page; the JSON has all that the report was given.
MART_ROWS = 100

#: Widths of a chart in CSS pixels: on a card of a wide page, and on a narrow one.
WIDE, NARROW = 520, 320

# A card without its chart, about, in CSS pixels.
_CARD_HEIGHT = 130


@dataclass(frozen=True, kw_only=True)
class _MartView:
    mart: MartReport
    chart: Chart | None
    #: The same chart, wide and narrow; the page shows the one that fits.
    drawings: Sequence[Markup]
    #: Of the card, about, in CSS pixels.
    height: int
    rows: Sequence[Sequence[Any]]
    total_rows: int


def render_html(report: BatchReport, *, json_name: str) -> str:
    """Return the page of *report*; *json_name* is the file of its data, next to it."""
    saved = measure_time_saved(report.runs, report.ended_at)
    script = _read_asset("report.js")
    template = _environment().get_template("report.html.j2")
    return template.render(
        report=report,
        json_name=json_name,
        style=Markup(_read_asset("report.css")),  # noqa: S704 - our own file, no data in it
        script=Markup(script),  # noqa: S704 - same
        script_hash=_hash_script(script),
        timeline=lay_out_timeline(report),
        saved=saved,
        steps=[(run.name, run_seconds(run, report.ended_at)) for run in saved.steps],
        failed_runs=_find_first_failures(report.runs),
        failed_audits=_sort_failed(report.audits),
        passed_audits=[audit for audit in report.audits if audit.passed],
        mart_columns=_share_out([_view_mart(mart) for mart in report.marts]),
        wall=seconds_between(report.started_at, report.ended_at),
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("phasewise.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=format_bytes, count="{:,}".format, moment=format_moment, seconds=format_seconds, value=format_value
    )
    environment.tests["numeric"] = is_number
    return environment


def _read_asset(name: str) -> str:
    return (resources.files("phasewise.report") / "templates" / name).read_text(encoding="utf-8")


def _hash_script(script: str) -> str:
    """Return the source expression that lets this script run, and no other, under the page's security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _find_first_failures(runs: Sequence[RunSpan]) -> list[RunSpan]:
    """Return the runs that failed or were cancelled, without those that only followed one below them."""
    failed = [run for run in runs if run.kind in ("failed", "cancelled")]
    parents = {run.parent for run in failed}
    return [run for run in failed if run.run_id not in parents]


def _sort_failed(audits: Sequence[AuditReport]) -> list[AuditReport]:
    failed = [audit for audit in audits if not audit.passed]
    return sorted(failed, key=lambda audit: (audit.severity != "blocking", audit.name))


def _view_mart(mart: MartReport) -> _MartView:
    chart = plan_chart(mart)
    drawn = [draw_chart(chart, WIDE), draw_chart(strip_tips(chart), NARROW)] if chart else []
    return _MartView(
        mart=mart,
        chart=chart,
        drawings=[drawing for drawing, _ in drawn],
        height=_CARD_HEIGHT + (drawn[0][1] if drawn else 0),
        rows=mart.rows[:MART_ROWS],
        total_rows=max(mart.total_rows or 0, len(mart.rows)),
    )


def _share_out(views: Sequence[_MartView]) -> list[list[_MartView]]:
    """Return the cards in two columns of about the same height, in their order within each."""
    columns: list[list[_MartView]] = [[], []]
    heights = [0, 0]
    for view in views:
        shorter = 0 if heights[0] <= heights[1] else 1
        columns[shorter].append(view)
        heights[shorter] += view.height
    return [column for column in columns if column]
