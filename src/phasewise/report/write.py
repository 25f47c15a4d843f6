"""Write a report to disk."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from phasewise.errors import ReportError
from phasewise.report.page import render_html
from phasewise.report.records import BatchReport
from phasewise.system.files import write_atomically

#: Goes up when a field changes its meaning or is removed.
JSON_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    html: Path
    json: Path
    #: A copy of the newest report's page, under a name that stays.
    latest: Path


def write_report(report: BatchReport, folder: Path) -> ReportFiles:
    """Write ``<batch>.html``, ``<batch>.json`` and ``latest.html`` into *folder*, each of them whole or not at all.

    Raises:
        ReportError: the folder cannot be written. What was published stays published.
    """
    stem = _name_file(report.batch)
    files = ReportFiles(html=folder / f"{stem}.html", json=folder / f"{stem}.json", latest=folder / "latest.html")
    page = render_report(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in ((files.json, report_to_json(report)), (files.html, page), (files.latest, page)):
            # A lone surrogate in a name has no UTF-8: escaped it is still readable, and valid JSON.
            write_atomically(path, text, errors="backslashreplace")
    except OSError as exc:
        raise ReportError(
            f"The report of batch {report.batch} could not be written to {folder}: {exc.strerror}.",
            hint="Free some space or make it writable, then run final-etl-job without a batch: it writes a new one.",
        ) from exc
    return files


def render_report(report: BatchReport) -> str:
    """Return the report as one HTML document that needs no network."""
    return render_html(report, json_name=f"{_name_file(report.batch)}.json")


def report_to_json(report: BatchReport) -> str:
    """Return the data of *report* as JSON; numbers that JSON lacks (NaN, Infinity, decimals) become text."""
    data = {"version": JSON_VERSION, **asdict(report)}
    return json.dumps(to_json_value(data), ensure_ascii=False, allow_nan=False, indent=1)


def to_json_value(value: object) -> Any:
    """Return *value* as JSON can hold it without loss; what JSON has no form for becomes its text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else json.dumps(value)  # NaN, Infinity, -Infinity
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [to_json_value(item) for item in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return value.hex() if isinstance(value, bytes | bytearray | memoryview) else str(value)


def _name_file(batch: str) -> str:
    """Return *batch* as a file name: batch ids are safe already, a name given by hand need not be."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", batch).lstrip(".")[:200] or "batch"
