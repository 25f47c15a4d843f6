"""The preflight's answer is compared with a simulator of slots that tries the orders of events themselves."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from phasewise.errors import PipelineInvalid
from phasewise.orchestration.deadlock import Limits, check_deadlock
from phasewise.project.pipeline import PHASES, FanOut, Phase, Step

MAIN = "main-etl-job/main-etl-deployment"


def step(name: str, *phases: Sequence[Step], queue: str = "orchestrators") -> Step:
    inner = tuple(Phase(steps=steps) for steps in phases)
    return Step(name=name, deployment=f"{name}/{name}", work_queue=queue, phases=inner)  # type: ignore[arg-type]


def fan_out(name: str, items: int, *phases: Sequence[Step], queue: str = "tables") -> FanOut:
    inner = tuple(Phase(steps=steps) for steps in phases)
    return FanOut(
        name=name,
        deployment=f"{name}/{name}",
        work_queue=queue,  # type: ignore[arg-type]
        over="item",
        items=[str(number) for number in range(items)],
        phases=inner,
    )


def table(name: str = "table") -> Step:
    return step(name, queue="tables")


def phases_of(*phases: Sequence[Step]) -> list[Phase]:
    return [Phase(steps=steps) for steps in phases]


def is_accepted(phases: Sequence[Phase], limits: Limits, *, batches: int = 1) -> bool:
    try:
        check(phases, limits, batches=batches)
    except PipelineInvalid:
        return False
    return True


def check(phases: Sequence[Phase], limits: Limits, *, batches: int = 1) -> None:
    check_deadlock(phases, limits, batches=batches)


# ── the simulator ─────────────────────────────────────────────────────────────────────────────────────────────────

IDLE, SCHEDULED, RUNNING, DONE = range(4)


@dataclass(frozen=True)
class Run:
    parent: int | None
    needs: tuple[str, ...]
    #: Indexes of the runs of each phase.
    phases: tuple[tuple[int, ...], ...]


#: State and phase of each run.
World = tuple[tuple[int, int], ...]


class Slots:
    """Runs that hold slots while they run and while they wait; one event at a time, in any order."""

    def __init__(self, phases: Sequence[Phase], limits: Limits, batches: int) -> None:
        self.runs: list[Run] = []
        named: dict[str, int | None] = {f"queue {name}": limit for name, limit in limits.queues.items()}
        named |= {f"deployment {name}": limit for name, limit in limits.deployments.items()}
        named |= {"pool": limits.pool}
        self.limits = {name: limit for name, limit in named.items() if limit is not None}
        main = Step(name="main_etl", deployment=MAIN, work_queue="orchestrators", phases=phases)
        self.roots = [self._add(main, None) for _ in range(batches)]
        self.start: World = tuple((SCHEDULED if index in self.roots else IDLE, 0) for index in range(len(self.runs)))

    def _add(self, one: Step, parent: int | None) -> int:
        index = len(self.runs)
        needs = tuple(
            name for name in (f"queue {one.work_queue}", f"deployment {one.deployment}", "pool") if name in self.limits
        )
        self.runs.append(Run(parent, needs, ()))
        phases = tuple(
            tuple(self._add(child, index) for child in phase.steps for _ in range(count_items(child)))
            for phase in one.phases
        )
        self.runs[index] = Run(parent, needs, phases)
        return index

    def list_next(self, world: World) -> Iterator[World]:
        """Yield what can come next by itself: a run gets its slots, ends, or triggers its next phase."""
        used = [
            need for run, (state, _) in zip(self.runs, world, strict=True) if state == RUNNING for need in run.needs
        ]
        for index, (state, phase) in enumerate(world):
            run = self.runs[index]
            if state == SCHEDULED and all(used.count(need) < self.limits[need] for need in run.needs):
                yield self._change(world, index, RUNNING, phase)
            elif state == RUNNING and phase >= len(run.phases):
                yield self._change(world, index, DONE, phase)
            elif state == RUNNING and all(world[child][0] == DONE for child in run.phases[phase]):
                yield self._change(world, index, RUNNING, phase + 1)

    def list_crashes(self, world: World) -> Iterator[World]:
        """Yield what comes when a process dies: its run queues again while the runs below it go on."""
        for index, (state, phase) in enumerate(world):
            if state == RUNNING:
                yield self._change(world, index, SCHEDULED, phase)

    def _change(self, world: World, index: int, state: int, phase: int) -> World:
        changed = list(world)
        changed[index] = (state, phase)
        run = self.runs[index]
        if state == RUNNING and phase < len(run.phases):
            for child in run.phases[phase]:
                if changed[child][0] == IDLE:
                    changed[child] = (SCHEDULED, 0)
        return tuple(changed)

    def is_deadlock(self, world: World) -> bool:
        return any(world[root][0] != DONE for root in self.roots) and next(self.list_next(world), None) is None

    def find_deadlock(self, most: int = 60_000) -> bool | None:
        """Try all orders of events; None when there are more than *most* states."""
        seen, todo = {self.start}, [self.start]
        while todo:
            world = todo.pop()
            if self.is_deadlock(world):
                return True
            new = {*self.list_next(world), *self.list_crashes(world)} - seen
            seen |= new
            todo += new
            if len(seen) > most:
                return None
        return False

    def run_at_random(self, chance: random.Random, crashes: int) -> bool:
        """Run one order of events; return whether all ended."""
        world = self.start
        while following := list(self.list_next(world)):
            dying = list(self.list_crashes(world))
            if crashes and dying and chance.random() < 0.2:
                crashes -= 1
                world = chance.choice(dying)
            else:
                world = chance.choice(following)
        return not self.is_deadlock(world)


def count_items(one: Step) -> int:
    return len(one.items) if isinstance(one, FanOut) else 1


@st.composite
def pipelines(draw: st.DrawFn, most: int, depth: int = 3) -> list[Phase]:
    """Draw phases with up to *most* runs, main_etl not counted, and *depth* levels of runs that wait."""
    left = most
    names = iter(range(10_000))

    def draw_phases(level: int, least: int) -> list[Phase]:
        nonlocal left
        phases = []
        for _ in range(draw(st.integers(least, 2))):
            steps: list[Step] = []
            for _ in range(draw(st.integers(1, 3))):
                items = draw(st.integers(1, 3))
                if items > left:
                    break
                left -= items
                inner = draw_phases(level + 1, 0) if level < depth and items == 1 else []
                queue = draw(st.sampled_from(["orchestrators", "tables"]))
                drawn = fan_out(f"s{next(names)}", items, queue=queue)
                if items > 1 and left >= items and draw(st.booleans()):
                    left -= items
                    inner = phases_of(
                        [step(f"s{next(names)}", queue=draw(st.sampled_from(["orchestrators", "tables"])))]
                    )
                steps.append(replace(drawn, phases=inner))
            if steps:
                phases.append(Phase(steps=steps))
        return phases

    return draw_phases(1, 1)


@st.composite
def drawn_limits(draw: st.DrawFn, most: int) -> Limits:
    number = st.one_of(st.none(), st.integers(1, most))
    return Limits(
        queues={"orchestrators": draw(st.integers(0, most)), "tables": draw(number)},
        # The lower of two: the less is limited, the more orders of events there are to try.
        pool=min([limit for limit in (draw(number), draw(number)) if limit is not None], default=None),
        deployments={MAIN: draw(number), "s0/s0": draw(number)},
    )


# ── what it proves ────────────────────────────────────────────────────────────────────────────────────────────────

CRASHED_ABOVE = phases_of([fan_out("a", 2, [step("b", [table()], queue="tables")], queue="orchestrators")])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(phases=pipelines(most=5), limits=drawn_limits(most=4), batches=st.integers(1, 2))
@example(phases=CRASHED_ABOVE, limits=Limits(queues={"orchestrators": 2, "tables": 2}), batches=1)
def test_what_is_refused_can_wait_for_itself_and_what_is_accepted_cannot_in_any_order_of_events(
    phases: list[Phase], limits: Limits, batches: int
) -> None:
    deadlocks = Slots(phases, limits, batches).find_deadlock()

    assume(deadlocks is not None)
    assert is_accepted(phases, limits, batches=batches) is not deadlocks


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(phases=pipelines(most=25), limits=drawn_limits(most=9), chance=st.randoms(use_true_random=False))
def test_larger_pipelines_that_are_accepted_end_in_every_order_that_is_tried(
    phases: list[Phase], limits: Limits, chance: random.Random
) -> None:
    assume(is_accepted(phases, limits))
    slots = Slots(phases, limits, batches=1)

    assert all(slots.run_at_random(chance, crashes) for crashes in (0, 0, 3, 10))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(phases=pipelines(most=12), limits=drawn_limits(most=5))
def test_the_advice_mends_the_pipeline_and_asks_for_no_more_than_is_needed(phases: list[Phase], limits: Limits) -> None:
    assume(not is_accepted(phases, limits))

    with pytest.raises(PipelineInvalid) as caught:
        check(phases, limits)
    advice = read_advice(str(caught.value.hint))

    assert is_accepted(phases, apply(limits, advice))
    for name, wanted in advice.items():
        for less in range(current_limit(limits, name), wanted):
            assert not is_accepted(phases, apply(limits, advice | {name: less}))


def read_advice(hint: str) -> Mapping[str, int]:
    return {name: int(limit) for name, limit in re.findall(r"set the limit of (.+?) to (\d+) or more", hint, re.I)}


def current_limit(limits: Limits, name: str) -> int:
    kind, _, quoted = name.partition(' "')
    named = {"work queue": limits.queues, "deployment": limits.deployments}.get(kind, {})
    limit = named[quoted.strip('"')] if named else limits.pool
    assert limit is not None
    return limit


def apply(limits: Limits, advice: Mapping[str, int]) -> Limits:
    for name, limit in advice.items():
        kind, _, quoted = name.partition(' "')
        if kind == "work queue":
            limits = replace(limits, queues={**limits.queues, quoted.strip('"'): limit})
        elif kind == "deployment":
            limits = replace(limits, deployments={**limits.deployments, quoted.strip('"'): limit})
        else:
            limits = replace(limits, pool=limit)
    return limits


# ── single cases ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_built_in_pipeline_runs_with_one_table_at_a_time() -> None:
    check_deadlock(PHASES, Limits(queues={"orchestrators": 2, "tables": 1}, pool=3))


def test_without_limits_nothing_is_refused() -> None:
    check_deadlock(PHASES, Limits(queues={}))
    check_deadlock(PHASES, Limits(queues={"orchestrators": None, "tables": None}))


def test_an_orchestrator_without_a_slot_for_what_it_waits_for_is_refused() -> None:
    with pytest.raises(PipelineInvalid) as caught:
        check_deadlock(PHASES, Limits(queues={"orchestrators": 1, "tables": 8}))

    message = str(caught.value)
    assert 'the only slot of work queue "orchestrators" can be held by main_etl' in message
    assert "waiting for main_etl → pre_etl or main_etl → sub_etl" in message
    assert 'Set the limit of work queue "orchestrators" to 2 or more' in message


def test_a_limit_of_the_pool_is_shared_by_its_queues() -> None:
    with pytest.raises(PipelineInvalid, match=r"all 2 slots of the work pool .* Set the limit of the work pool to 3"):
        check_deadlock(PHASES, Limits(queues={"orchestrators": 2, "tables": 1}, pool=2))


def test_orchestrators_three_levels_deep_need_a_slot_each() -> None:
    deep = phases_of([step("a", [step("b", [step("c", [table()])])])])

    check_deadlock(deep, Limits(queues={"orchestrators": 4, "tables": 1}))
    with pytest.raises(PipelineInvalid, match="main_etl → a → b, waiting for main_etl → a → b → c "):
        check_deadlock(deep, Limits(queues={"orchestrators": 3, "tables": 1}))


def test_orchestrators_that_wait_at_the_same_time_are_counted_together() -> None:
    both = phases_of([step("a", [step("inner")]), step("b", [step("inner2")])])

    check_deadlock(both, Limits(queues={"orchestrators": 4}))
    with pytest.raises(PipelineInvalid, match="to 4 or more"):
        check_deadlock(both, Limits(queues={"orchestrators": 3}))


def test_orchestrators_of_two_phases_are_not_counted_together() -> None:
    one_after_the_other = phases_of([step("a", [step("inner")])], [step("b", [step("inner2")])])

    check_deadlock(one_after_the_other, Limits(queues={"orchestrators": 3}))


def test_a_fan_out_of_orchestrators_over_unknown_items_fits_no_limit() -> None:
    wide = phases_of([fan_out("wide", 0, [step("inner")], queue="orchestrators")])

    with pytest.raises(PipelineInvalid, match='19 runs of main_etl → wide.* Remove the limit of work queue "orch'):
        check_deadlock(wide, Limits(queues={"orchestrators": 20}))


def test_a_fan_out_of_orchestrators_whose_tables_have_a_queue_of_their_own_is_accepted() -> None:
    wide = phases_of([fan_out("wide", 0, [table()], queue="orchestrators")])

    check_deadlock(wide, Limits(queues={"orchestrators": 2, "tables": 1}))


def test_a_limit_of_zero_is_refused_where_a_step_needs_it() -> None:
    with pytest.raises(PipelineInvalid, match='can never end: .* "tables", whose limit is 0'):
        check_deadlock(PHASES, Limits(queues={"orchestrators": 4, "tables": 0}))


def test_each_batch_that_runs_at_the_same_time_holds_its_own_slots() -> None:
    check_deadlock(PHASES, Limits(queues={"orchestrators": 3, "tables": 1}), batches=2)
    with pytest.raises(PipelineInvalid, match="2 runs of main_etl"):
        check_deadlock(PHASES, Limits(queues={"orchestrators": 2, "tables": 1}), batches=2)


def test_the_queue_of_the_deployment_counts_where_the_step_names_another() -> None:
    sub = "sub-etl-job/sub-etl-deployment"

    with pytest.raises(PipelineInvalid, match='work queue "tables"'):
        check_deadlock(PHASES, Limits(queues={"orchestrators": 2, "tables": 1}), work_queues={sub: "tables"})


def test_a_process_that_dies_above_a_run_that_waits_is_counted_with() -> None:
    limits = Limits(queues={"orchestrators": 2, "tables": 2})

    with pytest.raises(PipelineInvalid, match="2 runs of main_etl → a → b"):
        check_deadlock(CRASHED_ABOVE, limits)
