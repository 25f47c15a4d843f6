"""The report of a batch: one self-contained HTML file and its data as JSON beside it."""

from phasewise.report.records import (
    AuditReport,
    BatchReport,
    MartReport,
    RunSpan,
    TableReport,
)
from phasewise.report.write import ReportFiles, read_report, render_report, write_report

__all__ = [
    "AuditReport",
    "BatchReport",
    "MartReport",
    "ReportFiles",
    "RunSpan",
    "TableReport",
    "read_report",
    "render_report",
    "write_report",
]
