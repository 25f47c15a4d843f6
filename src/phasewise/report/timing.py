"""What the clock says about the flow runs of a batch: their tree, their phases, the time saved, the critical chain."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from phasewise.report.records import RunSpan


@dataclass(frozen=True, kw_only=True)
class RunNode:
    """A flow run with the runs that it triggered, in the order in which they started."""

    run: RunSpan
    children: tuple[RunNode, ...]

    def walk(self) -> Iterator[RunNode]:
        """Yield this run and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, kw_only=True)
class PhaseSpan:
    """Runs of one phase of the pipeline, from the first one's trigger to the last one's end."""

    name: str
    nodes: tuple[RunNode, ...]
    started_at: datetime | None
    ended_at: datetime | None

    @property
    def seconds(self) -> float:
        return seconds_between(self.started_at, self.ended_at)


@dataclass(frozen=True, kw_only=True)
class TimeSaved:
    """The steps one after another against the clock.

    A step is a run that triggered no other. Its seconds are those that it ran, over all attempts, without the time
    that it waited for a worker. The clock of a phase runs from the trigger of its first run to the end of its last
    one, so it has every wait in it.
    """

    steps: tuple[RunSpan, ...]
    phases: tuple[PhaseSpan, ...]
    #: Sum over the steps.
    steps_seconds: float
    #: Sum over the phases.
    wall_seconds: float
    #: Steps without times: they never started, and count for nothing.
    left_out: int
    #: Runs with more than one attempt; the clock has the pauses between attempts in it.
    retried: int

    @property
    def saved_seconds(self) -> float:
        return self.steps_seconds - self.wall_seconds

    @property
    def factor(self) -> float | None:
        return self.steps_seconds / self.wall_seconds if self.wall_seconds > 0 and self.steps else None


def build_tree(runs: Sequence[RunSpan]) -> tuple[RunNode, ...]:
    """Return the runs that no other run of *runs* triggered, each with those below it.

    A parent that is not among *runs* counts as none, and a circle of parents is opened at the run that closes it.
    """
    runs = list({run.run_id: run for run in runs}.values())
    parents = _resolve_parents(runs)
    children: dict[str | None, list[RunSpan]] = defaultdict(list)
    for run in runs:
        children[parents[run.run_id]].append(run)

    def build(parent: str | None) -> tuple[RunNode, ...]:
        below = sorted(children[parent], key=_start_order)
        return tuple(RunNode(run=run, children=build(run.run_id)) for run in below)

    return build(None)


def find_phases(roots: Sequence[RunNode], now: datetime) -> tuple[PhaseSpan, ...]:
    """Return the phases below the first run; runs outside of a phase are one that is called Runs."""
    nodes = roots[0].children if len(roots) == 1 and roots[0].children else tuple(roots)
    return tuple(replace(phase, name=phase.name or "Runs") for phase in split_by_phase(nodes, now))


def split_by_phase(nodes: Sequence[RunNode], now: datetime) -> tuple[PhaseSpan, ...]:
    """Return runs of one parent by their declared phases, in order of start; outside of a phase the name is empty."""
    groups: dict[str, list[RunNode]] = {}
    for node in nodes:
        groups.setdefault(node.run.phase or "", []).append(node)
    return tuple(_measure_phase(name, group, now) for name, group in groups.items())


def measure_time_saved(runs: Sequence[RunSpan], now: datetime) -> TimeSaved:
    """Compare the steps one after another with the clock; what still runs counts until *now*."""
    roots = build_tree(runs)
    leaves = [node.run for root in roots for node in root.walk() if not node.children]
    steps = tuple(run for run in leaves if run.started_at is not None)
    phases = find_phases(roots, now) if roots else ()
    return TimeSaved(
        steps=steps,
        phases=phases,
        steps_seconds=sum(run_seconds(run, now) for run in steps),
        wall_seconds=sum(phase.seconds for phase in phases),
        left_out=len(leaves) - len(steps),
        retried=sum(run.attempts > 1 for run in runs),
    )


def find_critical_chain(roots: Sequence[RunNode], now: datetime) -> frozenset[str]:
    """Return the run ids of the chain that ends with the last step, each started after the one before it ended.

    Walked backwards over the steps: before each is the one that ended last of those that may have held it up,
    by a barrier between phases or by the slot that it gave back.
    """
    paths = [path for root in roots for path in _walk_paths((root,)) if path[-1].run.started_at]
    chain: list[tuple[RunNode, ...]] = []
    for path in sorted(paths, key=lambda path: _end(path[-1].run, now), reverse=True):
        if not chain or _may_hold_up(path, chain[-1], now):
            chain.append(path)
    return frozenset(path[-1].run.run_id for path in chain) if len(chain) > 1 else frozenset()


def _walk_paths(path: tuple[RunNode, ...]) -> Iterator[tuple[RunNode, ...]]:
    """Yield, for each step below the last node of *path*, the runs that lead to it."""
    children = path[-1].children
    if not children:
        yield path
    for child in children:
        yield from _walk_paths((*path, child))


def _may_hold_up(path: Sequence[RunNode], later: Sequence[RunNode], now: datetime) -> bool:
    """Return whether all that ran on the one side, where the two paths part, ended before the other side started.

    A run of another branch ended earlier, but its branch continued next to the later one: it held nothing up.
    """
    pairs = zip(path, later, strict=False)
    one, other = next(((one.run, other.run) for one, other in pairs if one is not other), (None, None))
    return bool(one and other and other.started_at and _end(one, now) <= other.started_at)


def count_parallel(runs: Sequence[RunSpan], now: datetime) -> tuple[tuple[datetime, int], ...]:
    """Return how many of *runs* ran at the same time, as steps: from this moment on, this many."""
    changes: Counter[datetime] = Counter()
    for run in runs:
        if run.started_at is not None:
            changes[run.started_at] += 1
            changes[_end(run, now)] -= 1
    steps: list[tuple[datetime, int]] = []
    running = 0
    for moment in sorted(changes):
        running += changes[moment]
        steps.append((moment, running))
    return tuple(steps)


def run_seconds(run: RunSpan, now: datetime) -> float:
    """Return the seconds that *run* ran; 0 when it never started."""
    if run.started_at is None:
        return 0.0
    elapsed = seconds_between(run.started_at, _end(run, now))
    return elapsed if run.seconds is None else min(run.seconds, elapsed)


def seconds_between(start: datetime | None, end: datetime | None) -> float:
    """Return the seconds from *start* to *end*; 0 where one is missing or clocks of two machines disagree."""
    if start is None or end is None:
        return 0.0
    return max(0.0, (end - start).total_seconds())


def _resolve_parents(runs: Sequence[RunSpan]) -> dict[str, str | None]:
    ids = {run.run_id for run in runs}
    parents: dict[str, str | None] = {}
    for run in runs:
        parent = run.parent if run.parent in ids else None
        parents[run.run_id] = None if _closes_circle(run.run_id, parent, parents) else parent
    return parents


def _closes_circle(run_id: str, parent: str | None, parents: Mapping[str, str | None]) -> bool:
    while parent is not None:
        if parent == run_id:
            return True
        parent = parents.get(parent)
    return False


def _measure_phase(name: str, nodes: Sequence[RunNode], now: datetime) -> PhaseSpan:
    runs = [below.run for node in nodes for below in node.walk()]
    # A run that a resume rescheduled expects a start after its first one, hence the earlier of the two.
    starts = [min(run.started_at, run.expected_start or run.started_at) for run in runs if run.started_at]
    ends = [_end(run, now) for run in runs if run.started_at]
    return PhaseSpan(
        name=name, nodes=tuple(nodes), started_at=min(starts, default=None), ended_at=max(ends, default=None)
    )


def _end(run: RunSpan, now: datetime) -> datetime:
    """Return when *run* ended, or *now* while it runs; never before its start."""
    end = run.ended_at or now
    return end if run.started_at is None else max(end, run.started_at)


def _start_order(run: RunSpan) -> tuple[bool, datetime, str]:
    start = run.started_at or run.expected_start
    return (start is None, start or datetime.max.replace(tzinfo=UTC), run.name)
