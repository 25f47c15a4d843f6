"""What the clock says: the tree of the runs, their phases, the time saved, the critical chain."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phasewise.report.timing import build_tree, count_parallel, find_critical_chain, find_phases, measure_time_saved
from tests.unit.report.reports import PATIENTLY, TWO_PHASES, at, make_run


def test_a_step_is_a_run_that_triggered_no_other() -> None:
    saved = measure_time_saved(TWO_PHASES, at(10))

    assert [run.name for run in saved.steps] == ["a", "b/1", "b/2", "c"]
    assert saved.steps_seconds == 1 + 3 + 2 + 4


def test_the_clock_of_a_phase_has_the_wait_for_its_first_run_in_it() -> None:
    saved = measure_time_saved(TWO_PHASES, at(10))

    assert [phase.seconds for phase in saved.phases] == [5, 5]
    assert saved.wall_seconds == 10
    assert saved.factor == 1.0


def test_a_run_without_an_end_counts_until_the_report_was_written() -> None:
    runs = [make_run("main", 0, None), make_run("only", 1, None, parent="main", state="Running")]

    assert measure_time_saved(runs, at(7)).steps_seconds == 6


def test_a_run_that_never_started_counts_for_nothing_and_is_mentioned() -> None:
    runs = [*TWO_PHASES, make_run("d", None, None, parent="main", state="Scheduled")]

    saved = measure_time_saved(runs, at(10))

    assert (saved.left_out, saved.steps_seconds) == (1, 10)


def test_a_retried_run_counts_its_attempts_and_not_the_pause_between_them() -> None:
    runs = [make_run("main", 0, 100), make_run("t", 0, 100, parent="main", seconds=7.5, attempts=2)]

    saved = measure_time_saved(runs, at(100))

    assert (saved.steps_seconds, saved.wall_seconds, saved.retried) == (7.5, 100, 1)


def test_nothing_ran_means_no_factor() -> None:
    assert measure_time_saved([], at(1)).factor is None
    assert measure_time_saved([make_run("a", None, None)], at(1)).factor is None


def test_an_end_before_the_start_counts_as_no_time() -> None:
    assert measure_time_saved([make_run("a", 5, 4)], at(10)).steps_seconds == 0


def test_phases_have_the_names_that_the_pipeline_declares() -> None:
    phases = find_phases(build_tree(TWO_PHASES), at(10))

    named = [(phase.name, [node.run.name for node in phase.nodes]) for phase in phases]
    assert named == [("load", ["a", "b"]), ("publish", ["c"])]


def test_steps_that_wait_for_each_others_slot_are_still_one_phase() -> None:
    # With one slot pre, sub and final start one after another: by the clock they would be three phases.
    runs = [
        make_run("main", 0, 9),
        make_run("pre", 1, 2, parent="main", phase="load"),
        make_run("sub", 3, 5, parent="main", phase="load"),
        make_run("final", 6, 8, parent="main", phase="publish"),
    ]

    phases = find_phases(build_tree(runs), at(9))

    assert [(phase.name, phase.seconds) for phase in phases] == [("load", 4), ("publish", 2)]


def test_runs_that_no_pipeline_declares_are_together() -> None:
    runs = [
        make_run("main", 0, 9),
        make_run("a", 0, 2, parent="main"),
        make_run("b", 3, 9, parent="main"),
        make_run("c", 3, 4, parent="main", phase="publish"),
    ]

    assert [phase.name for phase in find_phases(build_tree(runs), at(9))] == ["Runs", "publish"]


def test_a_parent_is_found_by_its_id() -> None:
    child = make_run("child", 0, 1, parent="id-1")
    parent = make_run("parent", 0, 1, run_id="id-1")

    (root,) = build_tree([child, parent])

    assert [node.run.name for node in root.children] == ["child"]


@given(st.lists(st.integers(min_value=-1, max_value=7), max_size=8))
@PATIENTLY
def test_whatever_the_parents_each_run_is_in_the_tree_once(parents: list[int]) -> None:
    runs = [make_run(str(number), 0, 1, parent=str(parent)) for number, parent in enumerate(parents)]

    found = [node.run.name for root in build_tree(runs) for node in root.walk()]

    assert sorted(found) == sorted(run.name for run in runs)


def test_the_critical_chain_leads_back_from_the_last_step() -> None:
    chain = find_critical_chain(build_tree(TWO_PHASES), at(10))

    assert chain == {"c", "b/1"}


def test_the_critical_chain_follows_the_slot_that_a_run_waited_for() -> None:
    runs = [make_run("x/1", 0, 2), make_run("x/2", 0, 3), make_run("x/3", 2, 6), make_run("x/4", 3, 4)]

    assert find_critical_chain(build_tree(runs), at(6)) == {"x/1", "x/3"}


def test_a_run_beside_the_branch_of_another_is_not_in_its_chain() -> None:
    runs = [
        make_run("main", 0, 9),
        make_run("a", 0, 1, parent="main"),
        make_run("b", 0, 9, parent="main"),
        make_run("b/1", 2, 5, parent="b"),
        make_run("b/2", 6, 9, parent="b"),
    ]

    assert find_critical_chain(build_tree(runs), at(9)) == {"b/1", "b/2"}


def test_runs_side_by_side_have_no_critical_chain() -> None:
    runs = [make_run("a", 0, 2), make_run("b", 1, 3)]

    assert find_critical_chain(build_tree(runs), at(3)) == frozenset()


def test_a_run_that_starts_when_another_ends_does_not_run_beside_it() -> None:
    steps = count_parallel([make_run("a", 0, 2), make_run("b", 1, 3), make_run("c", 2, 4)], at(4))

    assert steps == ((at(0), 1), (at(1), 2), (at(2), 2), (at(3), 1), (at(4), 0))
