from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from phasewise.orchestration.fan_out_order import order_longest_first

#: Whole seconds, so that the sums below are exact.
seconds = st.integers(min_value=0, max_value=500)


def find_optimum(durations: Sequence[int], slots: int) -> int:
    """Return the shortest time in which *slots* can do all of them: tries every assignment that could be better."""
    best = sum(durations)
    shortest_possible = max([*durations, -(-sum(durations) // slots)])
    loads = [0] * slots
    longest_first = sorted(durations, reverse=True)

    def assign(index: int) -> None:
        nonlocal best
        if best == shortest_possible:
            return
        if index == len(longest_first):
            best = min(best, max(loads))
            return
        for load in sorted(set(loads)):  # slots with one load are alike
            slot = loads.index(load)
            if load + longest_first[index] < best:
                loads[slot] += longest_first[index]
                assign(index + 1)
                loads[slot] -= longest_first[index]

    assign(0)
    return best


def find_makespan(durations: Sequence[float], slots: int) -> float:
    """Return when all are done that start in this order, each as soon as one of *slots* is free.

    Longest first this is at most 4/3 − 1/(3 · slots) of the shortest time possible (Graham 1969).
    """
    ends = [0.0] * slots
    for seconds in durations:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def simulate_in_order(durations: Sequence[int], slots: int) -> float:
    """Return the time that a fan-out takes whose items start longest first."""
    by_item = {f"t{number}": float(value) for number, value in enumerate(durations)}
    order = order_longest_first(list(by_item), durations=by_item, sizes={})
    return find_makespan([by_item[item] for item in order], slots)


@given(durations=st.lists(seconds, max_size=8), slots=st.integers(min_value=1, max_value=4))
@example(durations=[5, 5, 4, 4, 3, 3, 3], slots=3)
def test_a_fan_out_in_this_order_takes_at_most_four_thirds_of_the_optimum(durations: list[int], slots: int) -> None:
    makespan = simulate_in_order(durations, slots)

    # Graham's bound: 4/3 − 1/(3m), multiplied out.
    assert makespan * 3 * slots <= find_optimum(durations, slots) * (4 * slots - 1)


def test_the_bound_of_four_thirds_is_reached_so_it_cannot_be_tightened() -> None:
    worst = [5, 5, 4, 4, 3, 3, 3]

    assert simulate_in_order(worst, 3) == 11
    assert find_optimum(worst, 3) == 9


@given(cuts=st.lists(st.lists(st.integers(0, 100_000), max_size=20), min_size=1, max_size=10), shuffled=st.randoms())
def test_the_bound_holds_for_large_fan_outs_too(cuts: list[list[int]], shuffled: random.Random) -> None:
    # Too many to try all assignments, so the optimum is known beforehand: each slot's time is cut into items.
    optimum, slots = 100_000, len(cuts)
    durations = [end - start for points in cuts for start, end in pairwise(sorted([0, *points, optimum]))]
    shuffled.shuffle(durations)

    makespan = simulate_in_order(durations, slots)

    assert optimum <= makespan
    assert makespan * 3 * slots <= optimum * (4 * slots - 1)


def test_items_that_took_longest_start_first() -> None:
    order = order_longest_first(["a", "b", "c"], durations={"a": 1, "b": 9, "c": 4, "dropped": 99}, sizes={})

    assert order == ["b", "c", "a"]


def test_an_item_without_history_is_placed_by_its_rows() -> None:
    order = order_longest_first(["a", "b", "new"], durations={"a": 10, "b": 2}, sizes={"a": 1000, "b": 200, "new": 500})

    assert order == ["a", "new", "b"]


def test_a_duration_counts_more_than_the_rows_of_the_source() -> None:
    order = order_longest_first(["wide", "long"], durations={"wide": 60, "long": 5}, sizes={"wide": 10, "long": 10**6})

    assert order == ["wide", "long"]


def test_without_any_history_the_rows_decide() -> None:
    assert order_longest_first(["a", "b", "c"], durations={}, sizes={"a": 5, "b": 50, "c": 0}) == ["b", "a", "c"]


def test_an_item_of_which_nothing_is_known_starts_first() -> None:
    assert order_longest_first(["a", "new", "b"], durations={"a": 5, "b": 50}, sizes={}) == ["new", "b", "a"]
    assert order_longest_first(["a", "new", "b"], durations={}, sizes={"a": 5, "b": 50}) == ["new", "b", "a"]


def test_items_that_are_equal_keep_their_order() -> None:
    assert order_longest_first(["b", "a", "c"], durations={}, sizes={}) == ["b", "a", "c"]


def test_many_small_tables_do_not_make_a_large_one_look_long() -> None:
    small = {f"small{number}": 0.1 for number in range(20)}
    rows = dict.fromkeys(small, 10) | {"large": 1_000_000, "new": 2_000_000}
    timed = small | {"large": 2.0, "shorter": 3.9, "longer": 4.1}

    order = order_longest_first(["shorter", "new", "longer"], durations=timed, sizes=rows)

    assert order == ["longer", "new", "shorter"]


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.data())
def test_the_order_has_every_item_once(items: list[str], data: st.DataObject) -> None:
    durations = data.draw(st.dictionaries(st.sampled_from("abcxyz"), st.floats(0, 1e6)))
    sizes = data.draw(st.dictionaries(st.sampled_from("cdefxyz"), st.integers(0, 10**9)))

    order = order_longest_first(items, durations=durations, sizes=sizes)

    assert sorted(order) == sorted(items)
