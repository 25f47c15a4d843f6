"""Find out whether a pipeline could wait for itself. Checked before it is deployed.

A flow run that waits for others holds its slots all the while. When such runs hold all slots of a limit, and what they
wait for needs one of these slots, nothing moves any more. ``check_deadlock`` computes whether that can happen, in any
order of events; it knows no list of bad configurations.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, combinations

from phasewise.errors import PipelineInvalid
from phasewise.project.pipeline import MAIN_ETL, FanOut, Phase, Step, find_phases

#: How many of the runs that hold the slots of a limit are named.
MAX_NAMED = 5
_POOL = "the work pool"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many flow runs may run at the same time; None, or missing in a mapping, is no limit."""

    #: By the name of the work queue.
    queues: Mapping[str, int | None] = field(default_factory=dict)
    pool: int | None = None
    #: By ``flow name/deployment name``.
    deployments: Mapping[str, int | None] = field(default_factory=dict)


def check_deadlock(
    phases: Sequence[Phase], limits: Limits, *, work_queues: Mapping[str, str] | None = None, batches: int = 1
) -> None:
    """Check that *batches* runs of ``main_etl`` with these phases can never wait for themselves.

    The queue of a step is its ``work_queue``, unless *work_queues* names another one for its deployment. A fan-out
    without items counts as any number of them. A run that crashes, or is stopped with its worker, gives its slot up and
    queues for another while its children run on: that is counted with.

    Raises:
        PipelineInvalid: they can; it names the limits, the steps that hold their slots and the step that waits, and
            the smallest limit that fixes it.
    """
    root = _build_node(replace(MAIN_ETL, phases=phases), batches, work_queues or {})
    capacities = _list_capacities(limits)
    if stuck := _find_stuck(root, capacities):
        raise PipelineInvalid(_describe_stuck(root, stuck, capacities), hint=_advise(root, capacities))


# ── the computation ───────────────────────────────────────────────────────────────────────────────────────────────
#
# Stuck is a set of flow runs that hold slots, such that each of them waits for a phase of its own and none of these
# phases can end. Runs that wait for nobody end by themselves, so the slots they hold come back: only the runs that
# wait count. For a set of limits that are assumed to be exhausted ("full") it is looked for bottom-up: a run can be
# stuck in one of its phases when one of the phase's steps needs a full limit (it is "blocked"), or is stuck itself.
# Which slots the stuck runs of a subtree can hold is a set of vectors, one number a limit. The assumption holds when
# one of the vectors of the whole tree exhausts just these limits, and exceeds none.
#
# It is exact: a set that is found comes about when the others are slow to be claimed while these are claimed from the
# top down, their earlier phases done (or stuck already, which is a deadlock too); and when nothing moves any more,
# the runs that hold slots are such a set. tests/unit/orchestration/test_deadlock.py compares it with
# all orders of events.

#: Slots held, in the order of the limits; the last number is 1 when a run is stuck, 0 when none is.
_Vector = tuple[int, ...]
#: Each vector that is possible, with the names of the runs that hold its slots: of the ways to it, one with few runs.
_Options = dict[_Vector, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A step with what it needs: a slot of each of *needs*."""

    name: str
    #: How many there are at the same time; None: any number.
    count: int | None
    needs: frozenset[str]
    phases: tuple[tuple[_Node, ...], ...]


@dataclass(frozen=True, kw_only=True)
class _Stuck:
    #: Names of the limits that are exhausted.
    full: frozenset[str]
    #: Names of the runs that hold their slots, one per run.
    holders: tuple[str, ...]


def _build_node(step: Step, count: int | None, work_queues: Mapping[str, str], path: tuple[str, ...] = ()) -> _Node:
    path = (*path, step.name)
    queue = work_queues.get(step.deployment, step.work_queue)
    needs = {f'work queue "{queue}"', f'deployment "{step.deployment}"', _POOL}
    phases = tuple(
        tuple(_build_node(child, _count_items(child), work_queues, path) for child in phase.steps)
        for phase in find_phases(step)
    )
    return _Node(name=" → ".join(path), count=count, needs=frozenset(needs), phases=phases)


def _count_items(step: Step) -> int | None:
    return (len(step.items) or None) if isinstance(step, FanOut) else 1


def _list_capacities(limits: Limits) -> dict[str, int]:
    named = {f'work queue "{name}"': limit for name, limit in limits.queues.items()}
    named |= {f'deployment "{name}"': limit for name, limit in limits.deployments.items()}
    return {name: limit for name, limit in {**named, _POOL: limits.pool}.items() if limit is not None}


def _find_stuck(root: _Node, capacities: Mapping[str, int]) -> _Stuck | None:
    """Return a deadlock, or None when no order of events leads to one."""
    used = _list_needs(root)
    capacities = {name: limit for name, limit in capacities.items() if name in used}
    for full in _list_subsets(capacities):
        search = _Search(capacities=capacities, full=full)
        for vector, holders in search.list_options((root,)).items():
            if search.is_exhausted(vector) and (vector[-1] or root.needs & full):
                return _Stuck(full=full, holders=holders)
    return None


def _list_needs(node: _Node) -> set[str]:
    return set(node.needs).union(*(_list_needs(child) for child in chain(*node.phases)))


def _list_subsets(capacities: Mapping[str, int]) -> Iterator[frozenset[str]]:
    """Yield the sets of limits that could be exhausted, small ones first: they are explained most easily."""
    for size in range(1, len(capacities) + 1):
        yield from map(frozenset, combinations(sorted(capacities), size))


@dataclass(frozen=True, kw_only=True)
class _Search:
    capacities: Mapping[str, int]
    full: frozenset[str]

    def is_exhausted(self, vector: _Vector) -> bool:
        held = dict(zip(self.capacities, vector, strict=False))
        return all(held[name] == self.capacities[name] for name in self.full)

    def list_options(self, steps: Iterable[_Node]) -> _Options:
        """Return what the runs of parallel *steps* can hold, each of them stuck, blocked or done."""
        options: _Options = {(0,) * (len(self.capacities) + 1): ()}
        for step in steps:
            single = self._list_stuck(step)
            latest, added = options, 0
            # One run more at a time, until all are counted or another one changes nothing.
            while latest and (step.count is None or added < step.count):
                sums = self._add(latest, single)
                latest = {vector: holders for vector, holders in sums.items() if vector not in options}
                options = options | latest
                added += 1
        return options

    def _list_stuck(self, node: _Node) -> _Options:
        """Return what one run of *node*, stuck in one of its phases, and the runs below it can hold."""
        below: _Options = {}
        for phase in node.phases:
            is_blocked = any(step.needs & self.full for step in phase)
            for vector, holders in self.list_options(phase).items():
                if is_blocked or vector[-1]:
                    below.setdefault(vector, holders)
        own = (*(int(name in node.needs) for name in self.capacities), 1)
        options = self._add({own: (node.name,)}, below)
        if node.needs & self.full:
            # Its process died: now it is blocked itself, and what is below it still holds its slots.
            options = {vector: holders for vector, holders in below.items() if vector[-1]} | options
        return options

    def _add(self, left: _Options, right: _Options) -> _Options:
        """Return the sums of both that exceed no limit."""
        sums: _Options = {}
        for (*held, is_stuck), holders in left.items():
            for (*more, is_other_stuck), others in right.items():
                total = [one + other for one, other in zip(held, more, strict=True)]
                if all(slots <= limit for slots, limit in zip(total, self.capacities.values(), strict=True)):
                    sums.setdefault((*total, is_stuck | is_other_stuck), holders + others)
        return sums


def _advise(root: _Node, capacities: Mapping[str, int]) -> str:
    """Return which limits to raise, and to what: of each the least that will do."""
    fixed = dict(capacities)
    while stuck := _find_stuck(root, fixed):
        for name in stuck.full:
            # At one more than the runs that wait could ever hold, it cannot be exhausted by them.
            most = _count_waiting(root, name)
            fixed.pop(name) if most is None else fixed.update({name: most + 1})
    advice = [f"remove the limit of {name}" for name in capacities if name not in fixed]
    for name, limit in list(fixed.items()):
        wider = range(capacities[name], limit + 1)
        works = partial(_works_with, root, fixed, name)
        fixed[name] = wider[bisect_left(wider, True, hi=len(wider) - 1, key=works)]
        if fixed[name] > capacities[name]:
            advice.append(f"set the limit of {name} to {fixed[name]} or more")
    text = " and ".join(advice)
    return f"{text[0].upper()}{text[1:]}, then deploy again."


def _works_with(root: _Node, capacities: Mapping[str, int], name: str, limit: int) -> bool:
    return _find_stuck(root, {**capacities, name: limit}) is None


def _count_waiting(node: _Node, name: str) -> int | None:
    """Return how many runs that wait for others could hold a slot of the limit *name*; None: any number."""
    if not node.phases or name not in _list_needs(node):
        return 0
    # Only one phase at a time is active.
    below = [[_count_waiting(step, name) for step in phase] for phase in node.phases]
    if node.count is None or any(count is None for count in chain(*below)):
        return None if name in _list_waiting_needs(node) else 0
    most = max(sum(count or 0 for count in phase) for phase in below)
    return node.count * (most + (name in node.needs))


def _list_waiting_needs(node: _Node) -> set[str]:
    if not node.phases:
        return set()
    return set(node.needs).union(*(_list_waiting_needs(child) for child in chain(*node.phases)))


def _describe_stuck(root: _Node, stuck: _Stuck, capacities: Mapping[str, int]) -> str:
    steps = list(dict.fromkeys(_list_waiting(root, stuck)))
    waiting = " or ".join(steps[:MAX_NAMED])
    taken = {name: capacities[name] for name in sorted(stuck.full)}
    without = [name for name, limit in taken.items() if limit == 0]
    if without:
        return f"The pipeline can never end: {waiting} needs a slot of {' and '.join(without)}, whose limit is 0."
    slots = " and ".join(f"{'the only slot' if n == 1 else f'all {n} slots'} of {name}" for name, n in taken.items())
    holders = " and ".join(
        name if count == 1 else f"{count} runs of {name}" for name, count in Counter(stuck.holders).items()
    )
    return f"The pipeline can wait for itself: {slots} can be held by {holders}, waiting for {waiting} to get one."


def _list_waiting(node: _Node, stuck: _Stuck) -> Iterator[str]:
    """Yield the steps that the last ones of the holders may wait for, and those whose process died above a holder."""
    is_above = any(holder.startswith(f"{node.name} → ") for holder in stuck.holders)
    if node.name not in stuck.holders and (is_above or not stuck.holders):
        yield node.name
    for child in chain(*node.phases):
        if is_above:
            yield from _list_waiting(child, stuck)
        elif node.name in stuck.holders and child.needs & stuck.full:
            yield child.name
