"""The timeline of a batch: each flow run a bar on one clock, parents above children, phases apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from phasewise.report.figures import format_seconds, time_ticks
from phasewise.report.records import BatchReport, RunSpan
from phasewise.report.timing import (
    PhaseSpan,
    RunNode,
    build_tree,
    count_parallel,
    find_critical_chain,
    find_phases,
    run_seconds,
    seconds_between,
    split_by_phase,
)

#: A fan-out with more runs than this starts folded; its row still shows how many ran at once.
OPEN_GROUP = 60


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A stretch of the clock, in percent of its whole length."""

    left: float
    width: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the timeline: a run with those below it, a phase of them, or a group of runs of one flow."""

    label: str
    #: The whole name, where *label* leaves out what the group says already.
    name: str
    kind: str
    state: str
    duration: str
    #: Times and state in words.
    detail: str
    bar: Bar | None
    #: From the trigger to the start: the wait for a worker or a slot.
    wait: Bar | None = None
    url: str | None = None
    is_critical: bool = False
    rows: tuple[Row, ...] = ()
    #: SVG path of how many ran at once, in a box of 1000 × 100; of a group only.
    area: str = ""
    is_open: bool = True


@dataclass(frozen=True, kw_only=True)
class Timeline:
    #: Place in percent and label of each tick.
    ticks: tuple[tuple[float, str], ...]
    #: Runs above the phases: main-etl-job.
    roots: tuple[Row, ...]
    phases: tuple[Row, ...]


def lay_out_timeline(report: BatchReport) -> Timeline:
    """Place the runs of *report* on one clock, which starts with the batch and ends with its last run."""
    roots = build_tree(report.runs)
    now = report.ended_at
    clock = _Clock(
        start=min([report.started_at, *(run.started_at for run in report.runs if run.started_at)]),
        end=max([now, *(run.ended_at for run in report.runs if run.ended_at)]),
        now=now,
        critical=find_critical_chain(roots, now),
    )
    has_parent = len(roots) == 1 and bool(roots[0].children)
    return Timeline(
        ticks=tuple((clock.place(at), label) for at, label in time_ticks(clock.seconds, 8)),
        roots=(clock.row(roots[0], is_alone=True),) if has_parent else (),
        phases=tuple(clock.phase(phase) for phase in find_phases(roots, now)) if roots else (),
    )


@dataclass(frozen=True, kw_only=True)
class _Clock:
    start: datetime
    end: datetime
    #: When the report was written: the end of what still runs.
    now: datetime
    critical: frozenset[str]

    @property
    def seconds(self) -> float:
        return max(seconds_between(self.start, self.end), 0.001)

    def place(self, seconds: float) -> float:
        return round(min(100.0, max(0.0, 100 * seconds / self.seconds)), 3)

    def bar(self, start: datetime | None, end: datetime | None) -> Bar | None:
        if start is None or end is None:
            return None
        left = self.place((start - self.start).total_seconds())
        return Bar(left=left, width=round(max(0.0, self.place((end - self.start).total_seconds()) - left), 3))

    def rows(self, nodes: Sequence[RunNode]) -> tuple[Row, ...]:
        """Return a row per run; runs of one flow side by side become a group."""
        flows = Counter(node.run.flow for node in nodes)
        rows: list[Row] = []
        for flow in dict.fromkeys(node.run.flow for node in nodes):
            same = [node for node in nodes if node.run.flow == flow]
            rows += [self.group(flow, same)] if flows[flow] > 1 else [self.row(same[0])]
        return tuple(rows)

    def row(self, node: RunNode, *, prefix: str = "", is_alone: bool = False) -> Row:
        run = node.run
        end = run.ended_at or self.now
        return Row(
            label=run.name.removeprefix(prefix) or run.name,
            name=run.name,
            kind=_classify(node),
            state=run.state,
            duration=format_seconds(run_seconds(run, self.now)) if run.started_at else "–",
            detail=self.describe(run),
            bar=self.bar(run.started_at, end),
            wait=self.bar(run.expected_start, run.started_at or end),
            url=run.url if run.url and run.url.startswith(("http://", "https://")) else None,
            is_critical=run.run_id in self.critical,
            rows=() if is_alone else self.inner_phases(node.children),
        )

    def inner_phases(self, nodes: Sequence[RunNode]) -> tuple[Row, ...]:
        """Return a row per phase of a run's own; runs outside of a phase are rows themselves."""
        rows: list[Row] = []
        for phase in split_by_phase(nodes, self.now):
            rows += [self.phase(phase)] if phase.name else self.rows(phase.nodes)
        return tuple(rows)

    def phase(self, phase: PhaseSpan) -> Row:
        return Row(
            label=phase.name,
            name=phase.name,
            kind="parent",
            state="",
            duration=format_seconds(phase.seconds),
            detail=f"phase {phase.name}: {format_seconds(phase.seconds)}",
            bar=self.bar(phase.started_at, phase.ended_at),
            rows=self.rows(phase.nodes),
        )

    def group(self, flow: str, nodes: Sequence[RunNode]) -> Row:
        runs = [node.run for node in nodes]
        starts = [run.started_at for run in runs if run.started_at]
        ends = [run.ended_at or self.now for run in runs if run.started_at]
        start, end = min(starts, default=None), max(ends, default=None)
        steps = count_parallel(runs, self.now)
        peak = max((count for _, count in steps), default=0)
        kinds = Counter(run.kind for run in runs)
        states = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return Row(
            label=f"{flow} × {len(runs):,}",
            name=f"{flow}: {states}; at most {peak} at the same time",
            kind="group",
            state=f"{peak} at once",
            duration=format_seconds(seconds_between(start, end)),
            detail=f"{len(runs):,} runs of {flow}: {states}\nat most {peak} at the same time",
            bar=self.bar(start, end),
            rows=tuple(self.row(node, prefix=f"{flow}/") for node in nodes),
            area=self.area(steps, peak),
            is_open=len(runs) <= OPEN_GROUP,
        )

    def area(self, steps: Sequence[tuple[datetime, int]], peak: int) -> str:
        if not peak:
            return ""
        places = [(self.place((moment - self.start).total_seconds()) * 10, count) for moment, count in steps]
        path = "".join(f"H{x:.1f}V{100 - 100 * count / peak:.1f}" for x, count in places)
        return f"M{places[0][0]:.1f},100{path}V100Z"

    def describe(self, run: RunSpan) -> str:
        lines = [run.name, run.state]
        if run.started_at:
            started = format_seconds((run.started_at - self.start).total_seconds())
            lines[1] += " when this report was written" if run.kind == "running" and not run.ended_at else ""
            lines.append(f"started {started} after the batch, ran {format_seconds(run_seconds(run, self.now))}")
        if run.started_at and run.expected_start and run.expected_start < run.started_at:
            lines.append(f"waited {format_seconds(seconds_between(run.expected_start, run.started_at))} to start")
        if run.attempts > 1:
            lines.append(f"{run.attempts} attempts")
        if run.run_id in self.critical:
            lines.append("on the critical chain")
        return "\n".join(lines)


def _classify(node: RunNode) -> str:
    """Return the style of a run's bar; that of a retried one says that pauses are in it."""
    words = ["parent" if node.children else "", node.run.kind, "retried" if node.run.attempts > 1 else ""]
    return " ".join(filter(None, words))
