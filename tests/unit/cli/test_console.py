"""The terminal: progress that is true at each moment, and rows that arrive as they are."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from rich.console import Console

from phasewise.cli.console import describe_change, make_printable, render_progress, render_rows, show_progress
from phasewise.outcomes import StepOutcome
from phasewise.report.records import RunSpan

START = datetime(2026, 1, 3, 2, 0, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def make_run(name: str, state: str, start: float | None = None, end: float | None = None, **fields: Any) -> StepOutcome:
    values: dict[str, Any] = {
        "name": name,
        "run_id": name,
        "state_type": {"TimedOut": "FAILED"}.get(state, state.upper()),
        "state_name": state,
        "started_at": None if start is None else at(start),
        "ended_at": None if end is None else at(end),
        "parent_id": "main-etl-job" if name != "main-etl-job" else None,
    }
    return StepOutcome(**(values | fields))


#: In the middle of the first phase: of five tables two are done, two run, one waits.
RUNNING = (
    make_run("main-etl-job", "Running", 0),
    make_run("pre-etl-job", "Completed", 0.2, 1.2, phase="load"),
    make_run("sub-etl-job", "Running", 0.3, phase="load"),
    make_run("process-table-etl/batting", "Completed", 1, 3, parent_id="sub-etl-job", phase="tables"),
    make_run("process-table-etl/people", "Completed", 1, 2, parent_id="sub-etl-job", phase="tables"),
    make_run("process-table-etl/teams", "Running", 3, parent_id="sub-etl-job", phase="tables"),
    make_run("process-table-etl/parks", "Running", 3, parent_id="sub-etl-job", phase="tables"),
    make_run("process-table-etl/schools", "Pending", parent_id="sub-etl-job", phase="tables", expected_at=at(1)),
)


def draw(runs: Sequence[StepOutcome], now: float, *, width: int = 100, ascii_only: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(render_progress([RunSpan.from_outcome(run) for run in runs], at(now), ascii_only=ascii_only))
    return capture.get()


def find_line(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def render(columns: Sequence[str], rows: Sequence[Sequence[object]], form: Any) -> str:
    file = io.StringIO()
    render_rows(columns, rows, form, file=file)
    return file.getvalue()


# ── Progress


def test_a_fan_out_is_one_line_with_its_counts_and_the_names_that_run() -> None:
    text = draw(RUNNING, 4)

    line = find_line(text, "process-table-etl")
    assert "2/5" in line
    assert "2 running" in line
    assert "1 waiting" in line
    assert find_line(text, "teams").strip() == "parks, teams"
    assert "batting" not in text


def test_each_run_has_its_state_and_its_seconds() -> None:
    text = draw(RUNNING, 4)

    assert find_line(text, "pre-etl-job").split() == ["✔", "pre-etl-job", "Completed", "1.0", "s"]
    assert find_line(text, "main-etl-job").split() == ["●", "main-etl-job", "Running", "4.0", "s"]


def test_a_phase_appears_when_its_first_run_is_triggered() -> None:
    ended = [make_run(run.name, "Completed", 1, 5, parent_id=run.parent_id, phase=run.phase) for run in RUNNING[1:]]
    final = make_run("final-etl-job", "Scheduled", expected_at=at(5.1), phase="publish")

    before = draw([RUNNING[0], *ended], 5.05)
    after = draw([RUNNING[0], *ended, final], 5.2)

    assert "publish" not in before
    assert [line.split()[0] for line in after.splitlines() if line.split()[0].isalpha()] == [
        "load",
        "tables",
        "publish",
    ]
    places = [after.index(name) for name in ("load", "sub-etl", "tables", "process-table-etl", "publish", "final-etl")]
    assert places == sorted(places)


def test_the_name_of_a_phase_cannot_steer_the_terminal() -> None:
    runs = [RUNNING[0], make_run("pre-etl-job", "Completed", 0.2, 1.2, phase="\x1b[2J[bold]load")]

    assert r"\x1b[2J[bold]load" in draw(runs, 2)


def test_a_fan_out_with_a_failure_is_marked_while_it_goes_on() -> None:
    runs = [*RUNNING[:5], make_run("process-table-etl/teams", "Crashed", 3, 4, parent_id="sub-etl-job", phase="tables")]

    line = find_line(draw(runs, 4), "process-table-etl")

    assert line.split()[0] == "✘"
    assert "1 failed" in line


def test_a_run_alone_is_one_line() -> None:
    assert draw(RUNNING[:1], 2).split() == ["●", "main-etl-job", "Running", "2.0", "s"]


def test_nothing_is_known_yet_draws_nothing() -> None:
    assert draw([], 0).strip() == ""


def test_a_terminal_without_unicode_gets_ascii_marks() -> None:
    assert find_line(draw(RUNNING, 4, ascii_only=True), "pre-etl-job").split()[0] == "+"


def test_a_narrow_terminal_is_not_broken() -> None:
    assert max(map(len, draw(RUNNING, 4, width=40).splitlines())) <= 40


def test_logs_get_one_line_per_change() -> None:
    file = io.StringIO()

    with show_progress(Console(file=file)) as show:
        show(RUNNING)
        show(RUNNING)
        show([*RUNNING[:5], make_run("process-table-etl/teams", "Completed", 3, 5.5)])

    lines = file.getvalue().splitlines()
    assert len(lines) == 8
    assert lines[-1].endswith("process-table-etl/teams  Completed in 2.5 s")
    assert not [line for line in lines if "schools" in line]


def test_a_terminal_ends_with_the_last_state() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system=None)

    with show_progress(console) as show:
        show(RUNNING)
        show([make_run("main-etl-job", "Completed", 0, 9)])

    assert "main-etl-job Completed" in file.getvalue()


def test_a_failed_run_says_why_on_its_line() -> None:
    run = make_run("process-table-etl/teams", "TimedOut", 1, 9, message="It took\nmore than 8 s.")

    assert describe_change(run).endswith(r"process-table-etl/teams  TimedOut: It took\nmore than 8 s.")


def test_a_name_cannot_steer_the_terminal_or_its_markup() -> None:
    name = "process-table-etl/\x1b[2J[bold]x\u202e"
    file = io.StringIO()

    with show_progress(Console(file=file)) as show:
        show([make_run(name, "Running", 0)])

    assert r"process-table-etl/\x1b[2J[bold]x\u202e" in file.getvalue()
    assert "\x1b" not in draw([make_run(name, "Running", 0), *RUNNING], 1)


def test_what_can_be_printed_stays_as_it_is() -> None:
    assert make_printable("naïve 🐘 表") == "naïve 🐘 表"


# ── Rows


def test_a_pipe_gets_every_value_whole() -> None:
    long = "x" * 500

    text = render(["name", "n"], [[long, 1]], "table")

    assert long in text
    assert text.splitlines()[-1] == "1 row"


def test_a_table_tells_null_from_the_empty_string() -> None:
    lines = render(["a", "b"], [["", None]], "table").splitlines()

    assert [line.split() for line in lines if "NULL" in line] == [["NULL"]]


def test_numbers_stand_at_the_right_of_their_column() -> None:
    lines = render(["hits", "x"], [[7, "a"], [4256, "b"]], "table").splitlines()

    assert [line.index(end) for line in lines for end in ("7 ", "6 ") if end in line] == [4, 4]


def test_csv_reads_back_and_tells_null_from_the_empty_string() -> None:
    text = render(["a,b", "c"], [['x "y"\nz', ""], [None, 1.5]], "csv")

    assert list(csv.reader(io.StringIO(text))) == [["a,b", "c"], ['x "y"\nz', ""], ["", "1.5"]]
    assert text.endswith("\n,1.5\n")
    assert text.count('""') == 3


def test_json_keeps_columns_of_the_same_name_and_every_value() -> None:
    row = [1, 2, Decimal("1.10"), float("inf"), date(2026, 1, 3), None, b"\xff"]

    (record,) = json.loads(render(["n", "n", "d", "f", "t", "e", "b"], [row], "json"))

    assert record == {"n": 1, "n_1": 2, "d": "1.10", "f": "Infinity", "t": "2026-01-03", "e": None, "b": "ff"}


@pytest.mark.parametrize(("form", "text"), [("csv", "a,b\n"), ("json", "[]\n")])
def test_no_rows_are_no_rows_in_every_format(form: str, text: str) -> None:
    assert render(["a", "b"], [], form) == text
