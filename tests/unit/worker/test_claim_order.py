from __future__ import annotations

from uuid import UUID, uuid4

from phasewise.worker.claim_order import LEAVE_SECONDS, Turns, first_of

WORKERS = ("one", "two", "three")


def some_runs(count: int) -> list[UUID]:
    return [uuid4() for _ in range(count)]


def test_each_run_is_claimed_at_once_by_exactly_one_worker() -> None:
    runs = some_runs(90)

    chosen = [run for name in WORKERS for run in Turns(name).choose(runs, WORKERS)]

    assert sorted(chosen) == sorted(runs)


def test_runs_are_shared_about_evenly() -> None:
    runs = some_runs(900)

    shares = [sum(first_of(run, WORKERS) == name for run in runs) for name in WORKERS]

    assert min(shares) > 200


def test_a_worker_that_knows_of_no_other_claims_everything() -> None:
    runs = some_runs(5)

    assert Turns("one").choose(runs, ()) == set(runs)


def test_a_run_that_its_worker_does_not_claim_is_claimed_by_another_a_moment_later() -> None:
    now = 100.0
    turns = Turns("one", clock=lambda: now)
    runs = some_runs(20)
    first = turns.choose(runs, WORKERS)
    assert turns.has_left

    now += LEAVE_SECONDS / 2
    assert turns.choose(runs, WORKERS) == first

    now += LEAVE_SECONDS / 2
    assert turns.choose(runs, WORKERS) == set(runs)


def test_a_run_that_comes_back_later_is_left_again() -> None:
    now = 100.0
    turns = Turns("one", clock=lambda: now)
    [run] = [run for run in some_runs(20) if first_of(run, WORKERS) != "one"][:1]
    turns.choose([run], WORKERS)
    turns.choose([], WORKERS)

    now += 2 * LEAVE_SECONDS

    assert turns.choose([run], WORKERS) == set()


def test_when_a_worker_goes_only_its_runs_change_hands() -> None:
    for run in some_runs(50):
        before = first_of(run, WORKERS)
        assert before == "three" or first_of(run, ("one", "two")) == before
