"""What people see in a terminal: the progress of a run while it runs, and the rows of a query."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import IO, Literal

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from phasewise.outcomes import StepOutcome
from phasewise.report.figures import format_seconds, is_number
from phasewise.report.records import RunKind, RunSpan
from phasewise.report.timing import (
    PhaseSpan,
    RunNode,
    build_tree,
    find_phases,
    run_seconds,
    seconds_between,
    split_by_phase,
)
from phasewise.report.write import to_json_value

RowFormat = Literal["table", "csv", "json"]

_STYLES: dict[RunKind, str] = {
    "completed": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "running": "cyan",
    "waiting": "dim",
}
_MARKS: dict[RunKind, tuple[str, str]] = {
    "completed": ("✔", "+"),
    "failed": ("✘", "x"),
    "cancelled": ("⊘", "/"),
    "running": ("●", "*"),
    "waiting": ("○", "."),
}


@contextmanager
def show_progress(console: Console | None = None) -> Iterator[Callable[[Sequence[StepOutcome]], None]]:
    """Yield what shows the run that was started with all that are known below it: called again, how far they are now.

    In a terminal it draws over itself, elsewhere (logs, pipes) it prints one line per change.
    """
    console = console or Console()
    if not console.is_terminal or console.is_dumb_terminal:
        yield _ProgressLines(console).update
        return
    drawing = _ProgressDrawing(console)
    with Live(get_renderable=drawing.render, console=console, refresh_per_second=5):
        yield drawing.update


def render_rows(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    format: RowFormat = "table",  # noqa: A002 - the name of the option that it comes from
    *,
    file: IO[str] | None = None,
) -> None:
    """Print *rows*, each with a value per column, to *file* (default: stdout).

    ``table`` is for people: in a terminal it folds long values, elsewhere it is as wide as it needs to be; NULL is
    shown as such. ``csv`` tells NULL (nothing) from the empty string (``""``). ``json`` is one array of objects;
    numbers that JSON lacks (NaN, Infinity, decimals), dates and bytes (as hex) are text in it.
    """
    file = file or sys.stdout
    write = {"table": _write_table, "csv": _write_csv, "json": _write_json}
    write[format](columns, rows, file)


def render_progress(runs: Sequence[RunSpan], now: datetime, *, ascii_only: bool = False) -> RenderableType:
    """Return *runs* as lines: phases, the runs in them, and each fan-out as one bar with its counts."""
    roots = build_tree(runs)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    lines = _ProgressGrid(grid, now, column=1 if ascii_only else 0)
    if len(roots) == 1:
        lines.add_run(roots[0], depth=0)
    if len(runs) > 1:
        lines.add_phases(find_phases(roots, now), depth=0)
    return grid


class _ProgressGrid:
    """Adds one line per run, or per fan-out, to a grid."""

    def __init__(self, grid: Table, now: datetime, *, column: int) -> None:
        self._grid = grid
        self._now = now
        #: Which form of a mark: the sign, or the ASCII for terminals that lack it.
        self._column = column

    def add_phases(self, phases: Sequence[PhaseSpan], depth: int) -> None:
        for phase in phases:
            if phase.name:
                name = Padding(Text(make_printable(phase.name), style="bold"), (0, 0, 0, 2 * depth))
                self._grid.add_row(name, "", Text(format_seconds(phase.seconds), style="bold"))
            self.add_runs(phase.nodes, depth + 1 if phase.name else depth)

    def add_runs(self, nodes: Sequence[RunNode], depth: int) -> None:
        for flow in dict.fromkeys(node.run.flow for node in nodes):
            same = [node for node in nodes if node.run.flow == flow]
            if len(same) > 1:
                self._add_group(flow, [node.run for node in same], depth)
            else:
                self.add_run(same[0], depth)
                self.add_phases(split_by_phase(same[0].children, self._now), depth + 1)

    def add_run(self, node: RunNode, depth: int) -> None:
        run = node.run
        took = format_seconds(run_seconds(run, self._now)) if run.started_at else ""
        self._grid.add_row(self._label(run.kind, run.name, depth), Text(run.state, style=_STYLES[run.kind]), took)

    def _add_group(self, flow: str, runs: Sequence[RunSpan], depth: int) -> None:
        counts = Counter(run.kind for run in runs)
        done = counts["completed"]
        starts = [run.started_at for run in runs if run.started_at]
        ends = [run.ended_at or self._now for run in runs if run.started_at]
        took = seconds_between(min(starts, default=None), max(ends, default=None))
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(total=len(runs), completed=done, width=24), _describe_counts(counts, len(runs)))
        self._grid.add_row(self._label(_sum_up(counts), flow, depth), row, format_seconds(took) if starts else "")
        running = [run.name.removeprefix(f"{flow}/") for run in runs if run.kind == "running"]
        if running:
            self._grid.add_row("", Text(make_printable(", ".join(running)), style="dim"), "")

    def _label(self, kind: RunKind, name: str, depth: int) -> RenderableType:
        mark = _MARKS[kind][self._column]
        return Padding(Text.assemble((mark, _STYLES[kind]), " ", make_printable(name)), (0, 0, 0, 2 * depth))


class _ProgressDrawing:
    def __init__(self, console: Console) -> None:
        self._ascii_only = console.options.ascii_only
        self._runs: list[RunSpan] = []

    def update(self, runs: Sequence[StepOutcome]) -> None:
        self._runs = [RunSpan.from_outcome(run) for run in runs]

    def render(self) -> RenderableType:
        # Called by the refreshing thread too; a list that is replaced as a whole needs no lock.
        return render_progress(self._runs, datetime.now(UTC), ascii_only=self._ascii_only)


class _ProgressLines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._states: dict[str, str] = {}

    def update(self, runs: Sequence[StepOutcome]) -> None:
        for run in runs:
            before, self._states[run.run_id] = self._states.get(run.run_id), run.state_name
            # Scheduled and Pending are no news: all runs of a fan-out pass through them at once.
            if before != run.state_name and RunSpan.from_outcome(run).kind != "waiting":
                self._console.print(Text(describe_change(run)), soft_wrap=True, highlight=False)


def describe_change(run: StepOutcome) -> str:
    """Return one line: the time, the run, its new state, and what came of it."""
    moment = (run.ended_at if run.is_final else run.started_at) or datetime.now(UTC)
    line = f"{moment.astimezone():%H:%M:%S}  {make_printable(run.name)}  {run.state_name}"
    if run.is_completed:
        return f"{line} in {format_seconds(run.seconds or seconds_between(run.started_at, run.ended_at))}"
    return f"{line}: {make_printable(run.message)}" if run.is_final and run.message else line


def make_printable(text: str) -> str:
    """Return *text* with its control characters escaped: a name must not be able to steer the terminal."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _describe_counts(counts: Counter[RunKind], total: int) -> Text:
    text = Text(f"{counts['completed']}/{total}")
    for kind in ("running", "waiting", "failed", "cancelled"):
        if counts[kind]:
            text.append(f"  {counts[kind]} {kind}", style=_STYLES[kind])
    return text


def _sum_up(counts: Counter[RunKind]) -> RunKind:
    """Return what a group of runs is as a whole: its worst, else what is still running."""
    return next((kind for kind in ("failed", "cancelled", "running", "waiting") if counts[kind]), "completed")


def _write_table(columns: Sequence[str], rows: Iterable[Sequence[object]], file: IO[str]) -> None:
    kept = [list(row) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        values = [row[place] for row in kept if row[place] is not None]
        is_numeric = bool(values) and all(is_number(value) for value in values)
        table.add_column(Text(make_printable(column)), justify="right" if is_numeric else "left", overflow="fold")
    for row in kept:
        table.add_row(*(_format_cell(value) for value in row))
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        # A pipe has no width: nothing is folded or cut there.
        console.width = max(
            console.width, console.measure(table, options=console.options.update(max_width=10**6)).maximum
        )
    console.print(table)
    console.print(f"{len(kept):,} {'row' if len(kept) == 1 else 'rows'}")


def _format_cell(value: object) -> Text:
    if value is None:
        return Text("NULL", style="dim")
    lines = str(to_json_value(value) if isinstance(value, bytes) else value).split("\n")
    return Text("\n".join(make_printable(line) for line in lines))


def _write_csv(columns: Sequence[str], rows: Iterable[Sequence[object]], file: IO[str]) -> None:
    for row in (columns, *rows):
        file.write(",".join(_quote_csv(value) for value in row) + "\n")


def _quote_csv(value: object) -> str:
    """Return one field; the csv module of Python 3.11 cannot tell None from the empty string."""
    if value is None:
        return ""
    text = str(to_json_value(value)) if isinstance(value, bytes) else str(value)
    needs_quotes = not text or any(character in text for character in ',"\r\n') or text != text.strip()
    return '"' + text.replace('"', '""') + '"' if needs_quotes else text


def _write_json(columns: Sequence[str], rows: Iterable[Sequence[object]], file: IO[str]) -> None:
    names = _make_unique(columns)
    between = "[\n"
    for row in rows:
        record = dict(zip(names, map(to_json_value, row), strict=True))
        file.write(between + json.dumps(record, ensure_ascii=False, allow_nan=False))
        between = ",\n"
    file.write("[]\n" if between == "[\n" else "\n]\n")


def _make_unique(columns: Sequence[str]) -> list[str]:
    """Return the names with a number behind those that came before: an object holds each name once."""
    names: list[str] = []
    for column in columns:
        name, number = column, 1
        while name in names:
            name, number = f"{column}_{number}", number + 1
        names.append(name)
    return names
