"""Waiting is exact whatever happens to the events: a simulated server on a fake clock, and drawn misfortunes."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid5

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prefect.client.orchestration import PrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from websockets import ServerConnection, Subprotocol, serve

from phasewise.orchestration import prefect_runs
from phasewise.orchestration.flow_runs import RunRequest
from phasewise.orchestration.phases import plan_requests
from phasewise.orchestration.prefect_runs import PrefectFlowRuns
from phasewise.orchestration.watch import _listen, watch_runs
from phasewise.outcomes import FINAL_TYPES, StepOutcome
from phasewise.project.pipeline import FanOut
from tests.unit.clock import run_on_fake_clock

POLL_SECONDS = 15.0
#: A failed read and the pause after it, a slow read that came just too early, and the one that finds the run.
SLACK_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Span:
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds

    def contains(self, when: float) -> bool:
        return self.start <= when < self.end


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What happens to one flow run, and to the news of it."""

    #: Seconds at which the server says for the first time that it is final.
    final_at: float
    state_type: str = "COMPLETED"
    #: Seconds at which an event about it arrives: none (it was lost), one, or more; also before *final_at*.
    told_at: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Weather:
    #: The server does not answer, and no event arrives.
    outages: tuple[Span, ...] = ()
    #: The socket is gone, and what is sent meanwhile is lost.
    drops: tuple[Span, ...] = ()
    #: Seconds at which events about runs of others arrive.
    noise: tuple[float, ...] = ()
    read_seconds: float = 0.02


@dataclass(kw_only=True)
class Server:
    fates: dict[str, Fate]
    weather: Weather
    #: Seconds at which each read began.
    reads: list[float] = field(default_factory=list)
    #: Seconds at which something was put into the queue of hints.
    hints: list[float] = field(default_factory=list)

    async def read(self, run_ids: Sequence[str]) -> list[StepOutcome]:
        now = asyncio.get_running_loop().time()
        self.reads.append(now)
        # What is true when the question arrives; the answer takes its time.
        outcomes = [self.describe(run_id, now) for run_id in run_ids]
        await asyncio.sleep(self.weather.read_seconds)
        after = asyncio.get_running_loop().time()
        if any(outage.contains(when) for outage in self.weather.outages for when in (now, after)):
            raise httpx.ConnectError("refused")
        return outcomes

    def describe(self, run_id: str, now: float) -> StepOutcome:
        fate = self.fates[run_id]
        state = fate.state_type if now >= fate.final_at else "RUNNING"
        return StepOutcome(name=run_id, run_id=run_id, state_type=state, state_name=state.title())

    async def listen(self, hints: asyncio.Queue[str | None]) -> None:
        loop = asyncio.get_running_loop()
        silent = [*self.weather.drops, *self.weather.outages]
        told = [(when, run_id) for run_id, fate in self.fates.items() for when in fate.told_at]
        news: list[tuple[float, str | None]] = [*told, *((when, "of-others") for when in self.weather.noise)]
        news = [(when, run_id) for when, run_id in news if not any(span.contains(when) for span in silent)]
        # After each gap the subscription is made again, and says so.
        news += [(span.end + 0.05, None) for span in silent] + [(0.0, None)]
        for when, run_id in sorted(news, key=lambda one: one[0]):
            await asyncio.sleep(max(0.0, when - loop.time()))
            self.hints.append(when)
            hints.put_nowait(run_id)
        await asyncio.Event().wait()

    async def watch(self) -> list[tuple[float, StepOutcome]]:
        """Return what ``watch_runs`` yielded, each with its time."""
        watched = watch_runs(list(self.fates), read=self.read, listen=self.listen, poll_seconds=POLL_SECONDS)
        async with aclosing(watched) as outcomes:  # type: ignore[type-var]
            return [(asyncio.get_running_loop().time(), outcome) async for outcome in outcomes]

    def latest(self, run_id: str) -> float:
        """Return by when *run_id* must have been yielded: a slow clock's round after it was final and reachable."""
        begin = self.fates[run_id].final_at
        for outage in sorted(self.weather.outages, key=lambda span: span.start):
            if outage.start < begin + POLL_SECONDS + SLACK_SECONDS and outage.end > begin:
                begin = outage.end
        return begin + POLL_SECONDS + SLACK_SECONDS


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="prefect.phasewise")


moments = st.floats(0, 300).map(lambda value: round(value, 2))


@st.composite
def fates(draw: st.DrawFn) -> Fate:
    final_at = draw(moments)
    offsets = draw(st.lists(st.sampled_from([-5.0, -0.01, 0.0, 0.0, 0.0, 0.01, 0.3, 4.0, 40.0]), max_size=3))
    return Fate(
        final_at=final_at,
        state_type=draw(st.sampled_from(FINAL_TYPES)),
        told_at=tuple(max(0.0, final_at + offset) for offset in offsets),
    )


@st.composite
def weathers(draw: st.DrawFn) -> Weather:
    return Weather(
        outages=tuple(draw(st.lists(st.builds(Span, start=moments, seconds=st.floats(0.1, 60)), max_size=2))),
        drops=tuple(draw(st.lists(st.builds(Span, start=moments, seconds=st.floats(0.1, 30)), max_size=3))),
        noise=tuple(draw(st.lists(moments, max_size=20))),
        read_seconds=draw(st.sampled_from([0.001, 0.02, 0.8])),
    )


LOST_AMONG_OTHERS = [Fate(final_at=1.0)] + [Fate(final_at=5.0 * n, told_at=(5.0 * n,)) for n in range(1, 40)]


@settings(deadline=None)
@given(drawn=st.lists(fates(), max_size=12), weather=weathers())
@example(drawn=LOST_AMONG_OTHERS, weather=Weather())
@example(drawn=[Fate(final_at=10.0, told_at=(9.99,))], weather=Weather())
@example(drawn=[Fate(final_at=10.0, told_at=(10.0,))], weather=Weather(outages=(Span(start=9.0, seconds=60.0),)))
def test_every_run_is_yielded_once_with_its_true_state_and_in_time(drawn: list[Fate], weather: Weather) -> None:
    server = Server(fates={f"run{number}": fate for number, fate in enumerate(drawn)}, weather=weather)

    yielded = run_on_fake_clock(server.watch())

    assert Counter(outcome.run_id for _, outcome in yielded) == Counter(dict.fromkeys(server.fates, 1))
    for when, outcome in yielded:
        fate = server.fates[outcome.run_id]
        assert outcome.state_type == fate.state_type
        assert when >= fate.final_at
        assert when <= server.latest(outcome.run_id)


@settings(deadline=None)
@given(drawn=st.lists(fates(), min_size=1, max_size=12), weather=weathers())
def test_reads_grow_with_time_and_news_and_not_with_the_number_of_runs(drawn: list[Fate], weather: Weather) -> None:
    server = Server(fates={f"run{number}": fate for number, fate in enumerate(drawn)}, weather=weather)

    yielded = run_on_fake_clock(server.watch())

    elapsed = max(when for when, _ in yielded)
    # While the server is away it is asked once a second, and one read may be under way at each end.
    unreachable = sum(outage.seconds + 2 for outage in weather.outages)
    news = sum(when <= elapsed for when in server.hints)
    assert len(server.reads) <= elapsed / POLL_SECONDS + news + unreachable + 2


def test_two_thousand_runs_of_which_nothing_is_heard_cost_one_read_each_round() -> None:
    server = Server(fates={f"run{number}": Fate(final_at=600.0) for number in range(2000)}, weather=Weather())

    yielded = run_on_fake_clock(server.watch())

    assert len(yielded) == 2000
    assert len(server.reads) <= 600 / POLL_SECONDS + 3


def test_news_that_come_together_cost_one_read() -> None:
    at_once = {f"run{n}": Fate(final_at=100.0, told_at=(100.0 + n / 100_000,)) for n in range(500)}
    server = Server(fates=at_once, weather=Weather())

    yielded = run_on_fake_clock(server.watch())

    assert max(when for when, _ in yielded) < 101.1
    assert sum(when >= 99.9 for when in server.reads) <= 2


def test_reads_are_bounded_by_time_when_thousands_end_one_by_one() -> None:
    fates = {f"run{n}": Fate(final_at=1 + n * 0.03, told_at=(1 + n * 0.03, 1.5 + n * 0.03)) for n in range(2000)}
    server = Server(fates=fates, weather=Weather())

    yielded = run_on_fake_clock(server.watch())

    assert len(yielded) == 2000
    assert max(when for when, _ in yielded) < 61.2
    # 30 in the first half of the minute, and in the second as many for each time that the pending ones halve.
    assert len(server.reads) <= 180
    gaps = [later - earlier for earlier, later in pairwise(server.reads)]
    assert min(gaps[5:]) >= 0.05


def test_a_run_whose_event_arrives_is_yielded_within_a_tenth_of_a_second() -> None:
    server = Server(fates={"a": Fate(final_at=8.0, told_at=(8.0,)), "b": Fate(final_at=9.0)}, weather=Weather())

    [(when, outcome), _] = run_on_fake_clock(server.watch())

    assert outcome.run_id == "a"
    assert when < 8.1


def test_a_lost_event_is_made_good_at_the_next_connection() -> None:
    lost = Fate(final_at=5.0, told_at=(5.0,))
    server = Server(fates={"a": lost}, weather=Weather(drops=(Span(start=4.0, seconds=2.0),)))

    [(when, _)] = run_on_fake_clock(server.watch())

    assert when < 6.2


# ── triggering ────────────────────────────────────────────────────────────────────────────────────────────────────

NAMESPACE = UUID(int=7)


class CountingServer:
    """The part of Prefect's API that triggering needs, and a count of what was asked."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.created: dict[str, str] = {}
        self.job_variables: list[object] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/api")
        name = re.sub(r"[0-9a-f-]{36}", "{id}", path)
        self.calls[name] += 1
        if name.startswith("/deployments/name/"):
            body: Any = {"id": str(NAMESPACE), "name": "d", "flow_id": str(NAMESPACE), "path": None}
        elif name.endswith("/create_flow_run/bulk"):
            body = {"results": [self._create(run) for run in json.loads(request.content)]}
        elif name == "/flow_runs/filter":
            body = []
        elif name == "/admin/version":
            body = "3.8.8"
        else:
            return httpx.Response(404, json={"detail": f"not simulated: {request.method} {name}"})
        return httpx.Response(200, json=body)

    def _create(self, run: dict[str, Any]) -> dict[str, str]:
        run_id = str(uuid5(NAMESPACE, run["idempotency_key"]))
        self.created[run_id] = run["name"]
        self.job_variables.append(run.get("job_variables"))
        return {"flow_run_id": run_id, "status": "CREATED"}

    @contextmanager
    def serving(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def connect() -> PrefectClient:
            transport = httpx.MockTransport(self.answer)
            return PrefectClient("http://prefect.test/api", httpx_settings={"transport": transport})

        with monkeypatch.context() as patch:
            patch.setattr(prefect_runs, "get_client", connect)
            yield


async def test_runs_are_told_their_environment_whatever_their_deployment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    server = CountingServer()
    request = RunRequest(deployment="f/d", name="one", key="b/one")
    with server.serving(monkeypatch):
        await PrefectFlowRuns(environment={"PHASEWISE_PROJECT": "/shop"}).submit([request])

    assert server.job_variables == [{"env": {"PHASEWISE_PROJECT": "/shop"}}]


async def test_triggering_costs_much_less_than_two_calls_a_child_and_grows_no_faster_than_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = {}
    for children in (100, 500, 2000):
        server = CountingServer()
        fan_out = FanOut(name="t", deployment="f/d", over="table", items=[f"t{n}" for n in range(children)])
        requests = plan_requests(fan_out, batch="b")
        with server.serving(monkeypatch):
            run_ids = await PrefectFlowRuns().submit(requests)

        assert [server.created[run_id] for run_id in run_ids] == [f"f/t{n}" for n in range(children)]
        calls[children] = server.calls.total()
    assert calls[2000] <= 2 * 2000
    assert calls[2000] <= 4 * calls[500]
    assert calls[2000] <= 2000 / 20


async def test_listening_that_is_over_before_the_server_has_answered_leaves_no_connection_open() -> None:
    is_open, is_closed = asyncio.Event(), asyncio.Event()

    async def say_nothing(connection: ServerConnection) -> None:
        await connection.recv()  # who it is that asks, and now waits for the answer
        is_open.set()
        await connection.wait_closed()
        is_closed.set()

    subprotocols = [Subprotocol("prefect")]
    async with serve(say_nothing, "127.0.0.1", 0, subprotocols=subprotocols, close_timeout=0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
            listening = asyncio.create_task(_listen([str(UUID(int=1))], asyncio.Queue()))
            await asyncio.wait_for(is_open.wait(), 20)

            listening.cancel()

            await asyncio.wait([listening])
            await asyncio.wait_for(is_closed.wait(), 5)
