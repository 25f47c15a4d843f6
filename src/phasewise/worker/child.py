"""The code of one flow run, or of its hooks, in the process that was forked for it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import io
import logging
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

import certifi
import prefect
from prefect._flow_run_suspension import FlowRunSuspensionRequest, is_suspended_flow_run_state
from prefect._internal.version_checking import _api_version_check_key, _cache_api_version_check
from prefect.client.orchestration import PrefectClient, SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events import RelatedResource
from prefect.events.related import RESOURCE_CACHE
from prefect.runner._hook_runner import HookRunner
from prefect.settings import get_current_settings
from pydantic import BaseModel

from phasewise.settings import Settings
from phasewise.worker.event_relay import Outlet

if TYPE_CHECKING:
    from prefect.flow_engine import BaseFlowRunEngine
    from prefect.flows import Flow
from phasewise.worker.fork_job import BEGUN, NO_HOOKS

# ── in the forkserver, before it forks ───────────────────────────────────────────────────────────────────────────


def warm_up() -> None:
    """Do once what Prefect would do in every flow run: none of it depends on the run."""
    import prefect._internal.version_checking as version_checking
    import prefect._internal.websockets as websockets
    import prefect.client.orchestration as orchestration
    from prefect import flow_engine
    from prefect.logging.handlers import PrefectConsoleHandler

    # Each client and socket reads the certificate authorities anew: five times a run, 22 ms and 1 MiB each.
    shared = _SharedContexts("ssl")
    for module in (version_checking, websockets, orchestration):
        module.ssl = shared  # type: ignore[attr-defined]
    shared.create_default_context(cafile=get_current_settings().api.ssl_cert_file or certifi.where())
    for model in _subclasses(BaseModel):
        if model.__module__.startswith("prefect.") and not model.__pydantic_complete__:
            with contextlib.suppress(Exception):  # it stays as it was: pydantic tries again on first use
                model.model_rebuild()
    # The console's highlighter compiles its twenty patterns when it has something to show.
    record = logging.LogRecord("prefect.flow_runs", logging.INFO, __file__, 1, "Warm.", None, None)
    PrefectConsoleHandler(stream=io.StringIO()).emit(record)
    flow_engine._send_heartbeats = _send_heartbeats
    flow_engine.observe_flow_run_suspension = _observe_suspension  # type: ignore[attr-defined] # its import of it


class _SharedContexts(ModuleType):
    """The module ``ssl``, but a default context is made once for the same arguments."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ssl, name)

    @functools.cached_property
    def create_default_context(self) -> Callable[..., ssl.SSLContext]:
        return functools.cache(ssl.create_default_context)


def _subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for subclass in model.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


# ── in the forked process ────────────────────────────────────────────────────────────────────────────────────────


def run_flow_run(entrypoint: str, api_url: str, known: dict[str, Any], descriptor: int) -> int:
    """Run the flow run that the environment names, as ``python -m prefect.engine`` would.

    ``known`` is what the worker has read already and the run would read again; what is missing there is read. On the
    socket ``descriptor`` the worker says when the run is suspended; the run says whether its flow has hooks, and hands
    over its events and logs.
    """
    from prefect.flow_engine import _main

    os.set_inheritable(descriptor, False)
    _use_known(known, api_url)
    _describe_flows_lazily()
    _Line.descriptor = descriptor
    _Line.outlet = Outlet(descriptor)
    _Line.outlet.install()
    for client in (SyncPrefectClient, PrefectClient):
        update = _with_pid(client.update_flow_run, os.environ["PREFECT__FLOW_RUN_ID"])
        client.update_flow_run = update  # type: ignore[method-assign]
    return _main([entrypoint])


def _use_known(known: dict[str, Any], api_url: str) -> None:
    """Put what the worker has read where Prefect would look for it, or instead of the function that would read it."""
    from prefect import flow_engine, results

    for url in (api_url, f"{api_url}/"):  # as the events client and as the others write it
        _cache_api_version_check(_api_version_check_key(url, prefect.__version__))
    now = datetime.now(UTC)
    for item in known.get("related", []):
        entry: dict[str, Any] = {"kind": item["kind"], "object": _KnownObject(item["labels"], item["tags"])}
        RESOURCE_CACHE[f"{item['kind']}.{item['key']}"] = (entry, now)  # type: ignore[assignment] # Prefect's own DateTime
    if "flow_run" in known:
        flow_run = FlowRun.model_validate(known["flow_run"])
        flow_engine.load_flow_run = lambda flow_run_id: flow_run
    if "result_storage" in known:
        block = known["result_storage"] and UUID(known["result_storage"])

        async def read_block() -> UUID | None:
            return block

        results._aread_server_default_result_storage_block_id = read_block
        results._read_server_default_result_storage_block_id = lambda: block


def _describe_flows_lazily() -> None:
    """Make the model and the schema of a flow's parameters when they are asked for, which a run does for its own alone.

    Prefect makes both for each flow that a file decorates: 3 ms for each, of a file with seven that is a seventh of all
    that a run costs.
    """
    from prefect import flows

    for name in ("parameter_schema", "ValidatedFunction"):
        setattr(flows, name, functools.partial(_Lazily, getattr(flows, name)))


class _Lazily:
    """What ``make`` returns for these arguments, made when something of it is asked for."""

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
def _observe_suspension(
    flow_run_id: UUID, suspension_request: FlowRunSuspensionRequest, polling_interval: float = 10
) -> Iterator[None]:
    """Stand in for Prefect's: the worker listens for all its runs, instead of one events subscription a run."""

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
def _send_heartbeats(engine: BaseFlowRunEngine[Any, Any], join_on_exit: bool = True) -> Iterator[None]:
    """Stand in for Prefect's, which looks once a second whether to end, and every run waits for that look."""
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

    async def resolve(_: FlowRun) -> Flow[Any, Any]:
        return await asyncio.to_thread(_load_flow_from_runtime_entrypoint, entrypoint)

    hooks = HookRunner(resolve_flow=resolve)
    run, entered = FlowRun.model_validate(flow_run), State.model_validate(state)
    if entered.is_crashed():
        asyncio.run(hooks.run_crashed_hooks(run, entered))
    else:
        asyncio.run(hooks.run_cancellation_hooks(run, entered))
