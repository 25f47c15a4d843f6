"""What the caretaker of a worker cancels; the rest of it is tested on real servers (test_g03, test_g08)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, Worker
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Failed, Pending, Running, Scheduled

from phasewise.worker import reaper
from phasewise.worker.reaper import Caretaker, Silence


def create_caretaker(client: Any, **options: Any) -> Caretaker:
    others: dict[str, Any] = {"own_runs": tuple, "on_cancelling": lambda _: None, "lost_after_seconds": 15, **options}
    return Caretaker(client, pool="pool", name="own", **others)


@pytest.mark.parametrize(
    ("state", "is_cancelled_below"),
    [(Failed(), True), (Cancelled(), True), (Cancelling(), True), (Running(), False), (Scheduled(), False)],
)
async def test_what_is_below_a_run_ends_with_it_unless_it_runs_again_meanwhile(
    monkeypatch: pytest.MonkeyPatch, state: State[Any], is_cancelled_below: bool
) -> None:
    run = FlowRun(id=uuid4(), flow_id=uuid4(), state=state)
    cancelled: list[UUID] = []

    async def read_runs(_client: object, _run_ids: object) -> list[FlowRun]:
        return [run]

    async def cancel_below(_client: object, run_ids: list[UUID], **_: object) -> list[UUID]:
        cancelled.extend(run_ids)
        return run_ids

    monkeypatch.setattr(reaper, "read_runs", read_runs)
    monkeypatch.setattr(reaper, "cancel_below", cancel_below)
    one = create_caretaker(None)

    await one._cancel_below({run.id})

    assert cancelled == ([run.id] if is_cancelled_below else [])


class DeadWorkersRun:
    """A client of a server with a worker that is silent and one run that names it."""

    def __init__(self, state: State[Any], *, seconds: float) -> None:
        self.now = now = datetime.now(UTC)
        state.timestamp = now - timedelta(seconds=seconds)
        self.run = FlowRun(id=uuid4(), flow_id=uuid4(), state=state, labels={"prefect.worker.name": "dead"})
        self.beats = {"own": now - timedelta(seconds=20), "dead": now - timedelta(seconds=22)}
        self.became: list[str | None] = []

    async def read_flow_run(self, _run_id: UUID) -> FlowRun:
        return self.run

    async def read_workers_for_work_pool(self, _pool: str) -> list[Worker]:
        pool = uuid4()
        return [Worker(name=name, work_pool_id=pool, last_heartbeat_time=at) for name, at in self.beats.items()]

    async def read_flow_runs(self, **_: object) -> list[FlowRun]:
        return [self.run]

    async def set_flow_run_state(self, run_id: UUID, state: State[Any]) -> None:
        assert run_id == self.run.id
        self.became.append(state.name)


@pytest.mark.parametrize(
    ("state", "seconds", "becomes"),
    [
        (Running(), 1, ["Crashed"]),
        (Cancelling(), 1, ["Cancelled"]),
        (Pending(), 20, ["AwaitingRetry"]),
        (Pending(), 1, []),
    ],
)
async def test_a_run_that_another_worker_has_just_claimed_is_not_lost_with_the_one_that_it_still_names(
    state: State[Any], seconds: float, becomes: list[str]
) -> None:
    client = DeadWorkersRun(state, seconds=seconds)
    one = create_caretaker(client)

    for ago in (20, 15, 10, 5):
        client.beats["own"] = client.now - timedelta(seconds=ago)
        await one._find_lost(is_first=False)
    assert client.became == []
    client.beats["own"] = client.now
    await one._find_lost(is_first=False)

    assert client.became == becomes


class StuckRuns:
    """A client of a server that shows *runs*; ``end`` is called with each that is given another state."""

    def __init__(self, *runs: FlowRun, end: Callable[[FlowRun, State[Any]], None]) -> None:
        self._runs = {run.id: run for run in runs}
        self._end = end
        self.looks = 0

    async def read_flow_runs(self, **_: object) -> list[FlowRun]:
        self.looks += 1
        return list(self._runs.values())

    async def read_flow_run(self, run_id: UUID) -> FlowRun:
        return self._runs[run_id]

    async def set_flow_run_state(self, run_id: UUID, state: State[Any]) -> None:
        self._end(self._runs.pop(run_id), state)


def create_run(worker: str | None, state: State[Any] | None = None, *, seconds: float = 0) -> FlowRun:
    """Return a run that names *worker* and has been in *state*, or in Cancelling, for *seconds*."""
    state = state or Cancelling()
    state.timestamp = datetime.now(UTC) - timedelta(seconds=seconds)
    labels = {"prefect.worker.name": worker} if worker else {}
    return FlowRun(id=uuid4(), flow_id=uuid4(), state=state, labels=labels)


async def test_a_run_of_ours_that_is_in_cancelling_without_a_process_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: asyncio.Queue[tuple[UUID, State[Any]]] = asyncio.Queue()
    ours, in_hand, of_another = create_run("own"), create_run("own"), create_run("other")
    client = StuckRuns(ours, in_hand, of_another, end=lambda run, state: ended.put_nowait((run.id, state)))
    asked: list[UUID] = []
    one = create_caretaker(client, own_runs=lambda: {in_hand.id}, on_cancelling=asked.append)
    monkeypatch.setattr(reaper, "_STUCK_SECONDS", 0.01)

    looking = asyncio.create_task(one.find_stuck())
    async with asyncio.timeout(10):
        run_id, state = await ended.get()
        while client.looks < 5:  # and none of the others
            await asyncio.sleep(0.01)
    looking.cancel()

    assert (run_id, state.name) == (ours.id, "Cancelled")
    assert state.message == "Its process had ended before it was cancelled."
    assert ended.empty()
    assert set(asked) == {in_hand.id}


async def test_a_run_is_left_alone_that_was_in_hand_or_of_another_worker_at_the_look_before() -> None:
    ended: list[UUID] = []
    was_ours, was_of_another = create_run("own"), create_run("other")
    client = StuckRuns(was_ours, was_of_another, end=lambda run, _: ended.append(run.id))
    in_hand = {was_ours.id}
    one = create_caretaker(client, own_runs=lambda: in_hand)

    await one._find_stuck()
    in_hand.clear()
    was_of_another.labels["prefect.worker.name"] = "own"
    await one._find_stuck()

    assert ended == []


@pytest.mark.parametrize(
    ("state", "seconds", "becomes"),
    [
        (Pending(), 90, "AwaitingRetry"),
        (Cancelling(), 90, "Cancelled"),
        (Pending(), 30, None),
        (Cancelling(), 30, None),
    ],
)
async def test_a_run_that_was_claimed_and_that_no_worker_put_its_name_to_does_not_stay_so(
    state: State[Any], seconds: float, becomes: str | None
) -> None:
    ended: list[tuple[str | None, str | None]] = []
    run = create_run(None, state, seconds=seconds)
    one = create_caretaker(StuckRuns(run, end=lambda _, state: ended.append((state.name, state.message))))

    await one._find_stuck()
    assert ended == []
    await one._find_stuck()

    assert ended == ([(becomes, "Its worker died before it started.")] if becomes else [])


async def test_a_run_that_another_worker_has_dealt_with_meanwhile_is_left_alone() -> None:
    ended: list[UUID] = []
    run = create_run("own")
    client = StuckRuns(run, end=lambda run, _: ended.append(run.id))
    one = create_caretaker(client)
    await one._find_stuck()

    async def read_flow_run(_: UUID) -> FlowRun:
        return run.model_copy(update={"state": AwaitingRetry()})

    client.read_flow_run = read_flow_run  # type: ignore[method-assign]
    await one._find_stuck()

    assert ended == []


async def test_a_run_that_is_deleted_meanwhile_does_not_end_the_looks_of_a_worker() -> None:
    def refuse(_run: FlowRun, _state: State[Any]) -> None:
        raise ObjectNotFound(RuntimeError("404"))

    one = create_caretaker(StuckRuns(create_run("own"), end=refuse))

    await one._find_stuck()
    await one._find_stuck()


START = datetime(2026, 1, 1, tzinfo=UTC)


def measure_silence(own_beats: Sequence[float], looks: Sequence[float], *, last_beat: float) -> float:
    """Return the longest silence since *last_beat* that any of *looks* found; all in seconds since the same moment."""
    silence = Silence()
    found = []
    for look in looks:
        beat = max(beat for beat in own_beats if beat <= look)
        silence.note(START + timedelta(seconds=beat), look)
        found.append(silence.measure(START + timedelta(seconds=last_beat)))
    return max(found)


def every(seconds: float, *, start: float, end: float) -> list[float]:
    return [start + seconds * n for n in range(int((end - start) / seconds) + 1)]


def test_silence_is_what_passed_on_the_clock_of_our_own_heartbeats() -> None:
    assert measure_silence(every(5, start=0, end=20), every(3, start=0, end=21), last_beat=2) == 18


def test_our_own_heartbeats_before_the_other_s_last_do_not_count() -> None:
    assert measure_silence(every(5, start=0, end=10), every(3, start=0, end=12), last_beat=10) == 0


def test_a_machine_that_is_merely_slow_finds_the_dead_all_the_same() -> None:
    assert measure_silence(every(9, start=0, end=27), every(7, start=0, end=28), last_beat=2) > 15


@pytest.mark.parametrize("stall", [1.0, 4.9, 5.1, 8.0, 10.0, 12.0, 16.5, 60.0])
def test_a_stall_makes_nobody_silent(stall: float) -> None:
    # The worst that can come about: the other one was about to beat when everything stood still at 6.4 s.
    own_beats = [0.0, *every(6.4, start=6.4 + stall, end=9 + stall)]
    looks = [0.0, 3.0, 6.0, *every(3, start=6.4 + stall, end=9 + stall)]

    assert measure_silence(own_beats, looks, last_beat=0) < 15


@pytest.mark.parametrize("outage", [2.0, 5.0, 6.1, 7.0, 8.0, 10.0, 15.0, 29.0, 31.0, 45.0, 60.0])
def test_nobody_is_silent_who_asks_a_server_again_after_pauses_that_double(outage: float) -> None:
    # Asks 0, 2, 6, 14, 30 and 62 s after the server went away at 6.4 s, as Prefect's client does: with 20 % of jitter.
    asked_again = [pause for pause in (2, 6, 14, 30, 62) if pause >= outage]
    returns = 6.4 + 1.2 * asked_again[0]
    back = 6.4 + outage
    # Our own heartbeats are back at once; our looks are requests that ask again like any other.
    own_beats = [0.0, 5.0, *every(5, start=back, end=returns + 5)]
    looks = [0.0, 3.0, 6.0, *every(3, start=6.4 + 0.8 * asked_again[0], end=max(returns, 6.4 + 0.8 * asked_again[0]))]

    assert measure_silence(own_beats, [look for look in looks if look <= 6 or look >= back], last_beat=1.0) < 15


def test_who_does_not_come_back_after_an_outage_is_found() -> None:
    own_beats = [0.0, 5.0, *every(5, start=65, end=150)]

    assert measure_silence(own_beats, [0.0, 3.0, 6.0, *every(3, start=66, end=150)], last_beat=5) > 30
