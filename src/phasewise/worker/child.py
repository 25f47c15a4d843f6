"""The code of one flow run, or of its hooks. Runs in the process that was forked for it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

import prefect
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events import RelatedResource

from phasewise.patches import entries
from phasewise.patches.registry import apply, may_apply
from phasewise.settings import Settings
from phasewise.worker.event_outlet import Outlet
from phasewise.worker.fork_job import BEGUN, NO_HOOKS

if TYPE_CHECKING:
    from prefect.flow_engine import BaseFlowRunEngine
    from prefect.flows import Flow


def run_flow_run(entrypoint: str, api_url: str, known: dict[str, Any], descriptor: int) -> int:
    """Run the flow run that the environment names, as ``python -m prefect.engine`` would.

    ``known`` is what the worker has read already and the run would read again; what is missing there is read. On the
    socket ``descriptor`` the worker says when the run is suspended; the run says whether its flow has hooks, and hands
    over its events and logs.
    """
    from prefect.flow_engine import _main

    os.set_inheritable(descriptor, False)
    _use_known(known, api_url)
    apply(entries.DESCRIBE_FLOWS_LAZILY, lambda stock: functools.partial(_Lazily, stock))
    _Line.descriptor = descriptor
    _Line.outlet = Outlet(descriptor)
    _Line.outlet.install()
    apply(entries.TELL_PID, lambda stock: _with_pid(stock, os.environ["PREFECT__FLOW_RUN_ID"]))
    return _main([entrypoint])


def _use_known(known: dict[str, Any], api_url: str) -> None:
    """Put what the worker has read where Prefect would look for it, or instead of the function that would read it."""
    if may_apply(entries.KNOWN_VERSION):
        from prefect._internal.version_checking import _api_version_check_key, _cache_api_version_check

        for url in (api_url, f"{api_url}/"):  # as the events client and as the others write it
            _cache_api_version_check(_api_version_check_key(url, prefect.__version__))
    if may_apply(entries.KNOWN_RELATED):
        from prefect.events.related import RESOURCE_CACHE

        now = datetime.now(UTC)
        for item in known.get("related", []):
            entry: dict[str, Any] = {"kind": item["kind"], "object": _KnownObject(item["labels"], item["tags"])}
            RESOURCE_CACHE[f"{item['kind']}.{item['key']}"] = (entry, now)  # type: ignore[assignment] # its own DateTime
    if "flow_run" in known:
        flow_run = FlowRun.model_validate(known["flow_run"])
        apply(entries.KNOWN_RUN, lambda _: lambda flow_run_id: flow_run)
    if "result_storage" in known:
        block = known["result_storage"] and UUID(known["result_storage"])

        async def read_block() -> UUID | None:
            return block

        apply(entries.KNOWN_RESULT_STORAGE, lambda stock: read_block if iscoroutinefunction(stock) else lambda: block)


class _Lazily:
    """What ``make`` returns for these arguments, made when something of it is asked for.

    Prefect makes the model and the schema of the parameters of each flow that a file decorates, 3 ms for each; a run
    needs those of its own flow.
    """

    def __init__(self, make: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._make = functools.cache(functools.partial(make, *args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)

    def __reduce__(self) -> tuple[Any, ...]:  # a flow may be pickled to run elsewhere
        return copy.copy, (self._make(),)


def _with_pid(update: Callable[..., Any], own_id: str) -> Callable[..., Any]:
    """Let the update that the engine begins with carry the process id too, which a worker reports otherwise."""

    @functools.wraps(update)
    def update_flow_run(client: Any, flow_run_id: UUID, *args: Any, **changes: Any) -> Any:
        if str(flow_run_id) == own_id:
            _Line.outlet.note(BEGUN)
            changes.setdefault("infrastructure_pid", str(os.getpid()))
        return update(client, flow_run_id, *args, **changes)

    return update_flow_run


@dataclass(frozen=True)
class _KnownObject:
    """What Prefect needs of an object to relate an event to it."""

    labels: dict[str, str]
    tags: list[str]

    def as_related_resource(self, role: str) -> RelatedResource:
        return RelatedResource({**self.labels, "prefect.resource.role": role})


class _Line:
    """The socket to the worker: where this process hears that its flow run was suspended."""

    descriptor: ClassVar[int]
    outlet: ClassVar[Outlet]
    _has_told: ClassVar[bool] = False

    @classmethod
    def tell_hooks(cls, flow: Flow[Any, Any]) -> None:
        """Say whether the flow of the run has hooks; flows that it calls, which come later, do not count."""
        if not cls._has_told:
            cls._has_told = True
            if not (flow.on_cancellation_hooks or flow.on_crashed_hooks):
                cls.outlet.note(NO_HOOKS)


@contextlib.contextmanager
def observe_suspension(flow_run_id: UUID, suspension_request: Any, polling_interval: float = 10) -> Iterator[None]:
    """Replace Prefect's: the worker listens for all its runs, instead of one events subscription a run."""
    from prefect._flow_run_suspension import is_suspended_flow_run_state

    def wait() -> None:
        if not os.read(_Line.descriptor, 1):
            return
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run_id).state
        if state is None or not is_suspended_flow_run_state(state):
            # It has been resumed already, elsewhere: this process must stop all the same.
            state = State(type=StateType.PAUSED, name="Suspended")
        suspension_request.mark_requested(state)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(wait,), name="suspension", daemon=True).start()
    yield


@contextlib.contextmanager
def send_heartbeats(engine: BaseFlowRunEngine[Any, Any], join_on_exit: bool = True) -> Iterator[None]:
    """Replace Prefect's, which looks once a second whether to end, and every run waits for that look."""
    _Line.tell_hooks(engine.flow)
    try:
        with _heartbeats(engine, join_on_exit):
            yield
    except MemoryError as exc:
        if not exc.args and (limit := Settings().run_memory_limit):  # it becomes the message of the run's state
            exc.args = (f"A flow run may use {limit.human_readable()} of memory (PHASEWISE_RUN_MEMORY_LIMIT).",)
        raise


@contextlib.contextmanager
def _heartbeats(engine: BaseFlowRunEngine[Any, Any], join_on_exit: bool) -> Iterator[None]:
    seconds = engine.heartbeat_seconds
    if seconds is None:
        yield
        return
    resource, related = engine._build_heartbeat_event_template()
    ended = threading.Event()

    def beat() -> None:
        while not (engine.flow_run and engine.flow_run.state and engine.flow_run.state.is_final()):
            try:
                engine._emit_flow_run_heartbeat(resource, related)
            except Exception:
                engine.logger.debug("Failed to emit heartbeat", exc_info=True)
            if ended.wait(seconds):
                return

    # With the settings of the run, which a new thread would not have.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(beat,), name="heartbeats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        if join_on_exit:
            thread.join(timeout=2)


def run_hooks(entrypoint: str, flow_run: dict[str, Any], state: dict[str, Any]) -> None:
    """Run the hooks of the flow at *entrypoint* for *state*: those for a cancellation or those for a crash."""
    from prefect.flow_engine import _load_flow_from_runtime_entrypoint
    from prefect.runner._hook_runner import HookRunner

    async def resolve(_: FlowRun) -> Flow[Any, Any]:
        return await asyncio.to_thread(_load_flow_from_runtime_entrypoint, entrypoint)

    hooks = HookRunner(resolve_flow=resolve)
    run, entered = FlowRun.model_validate(flow_run), State.model_validate(state)
    if entered.is_crashed():
        asyncio.run(hooks.run_crashed_hooks(run, entered))
    else:
        asyncio.run(hooks.run_cancellation_hooks(run, entered))
