"""Small reports, and what is in a page, for the tests of this folder."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from pydantic import TypeAdapter

from phasewise.report.records import BatchReport, MartReport, RunSpan
from phasewise.report.write import JSON_VERSION

SAMPLE = Path(__file__).parents[2] / "data" / "report.json"
#: A busy machine is no reason to fail.
PATIENTLY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
START = datetime(2026, 1, 3, 2, 0, tzinfo=UTC)


def read_report(path: Path) -> BatchReport:
    """Return the data of a report that ``write_report`` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data.pop("version") == JSON_VERSION
    return TypeAdapter(BatchReport).validate_python(data)


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
