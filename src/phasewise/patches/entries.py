"""Every place where Phasewise replaces or needs the inside of another library: what, why and for which gain.

The numbers were taken with Prefect 3.9.1 by ``benchmarks/patches.py``. How to add, change or remove a patch:
docs/how-to/change-a-patch.md.
"""

from __future__ import annotations

from phasewise.patches.registry import Patch, left_out, why_not

_RUNS = "prefect.server.database.orm_models:"
_TASK = "(task, task_run_id=None, task_run=None, parameters=None, wait_for=None, return_type='result', …"
_SELECTIN = "(('lazy', 'selectin'),)"

# ── the server ───────────────────────────────────────────────────────────────────────────────────────────────────

ONE_WRITER = Patch(
    name="one-writer",
    process="server",
    needs={
        "prefect.server.database.dependencies:set_database_config": "(database_config)",
        "prefect.server.database.configurations:AioSqliteConfiguration.setup_sqlite": "(self, conn, record)",
        "prefect.server.database.configurations:AioSqliteConfiguration.begin_transaction": "(self, session, "
        "with_for_update=False)",
        "prefect.server.database.configurations:SQLITE_BEGIN_MODE": "ContextVar",
    },
    why="Prefect lets SQLite turn readers into writers; two at once are answered 503, and clients wait for seconds.",
    gain="22 answers 503 in 25 flow runs → 0",
    until="Prefect begins transactions that write as writers",
    is_optional=False,
)
INLINE_SQLITE = Patch(
    name="inline-sqlite",
    process="server",
    needs={
        "sqlalchemy.util:await_only": "(awaitable)",
        "sqlalchemy.connectors.asyncio:AsyncAdapt_dbapi_cursor._async_soft_close": "(self)",
        "sqlalchemy.pool:AsyncAdaptedQueuePool": "(creator, …",
    },
    why="aiosqlite hands each step of a statement to a thread and back, ten times the cost of the statement.",
    gain="33 % of the server",
    until="aiosqlite, or another driver of SQLAlchemy's, executes in the thread of the loop",
)
INSERT_ROWS = Patch(
    name="insert-rows",
    process="server",
    needs={
        "prefect.server.database.dependencies:set_query_components": "(query_components)",
        "prefect.server.database.query_components:AioSqliteQueryComponents.insert": "(self, obj) b8097423",
    },
    why="Prefect writes rows as values in the statement, which SQLAlchemy compiles again for each number of rows.",
    gain="22 % of the server",
    until="Prefect passes the rows as parameters",
)
JOIN_SINGLE_OBJECTS = Patch(
    name="join-single-objects",
    process="server",
    targets={
        f"{_RUNS}{name}.strategy_key": _SELECTIN
        for name in (
            "FlowRun.__mapper__.relationships._state",
            "FlowRun.__mapper__.relationships.work_queue",
            "TaskRun.__mapper__.relationships._state",
            "Deployment.__mapper__.relationships.global_concurrency_limit",
            "Deployment.__mapper__.relationships.work_queue",
            "WorkQueue.__mapper__.relationships.work_pool",
        )
    },
    why="Prefect reads the state, the queue and the pool of a run with one more statement for each.",
    gain="6 % of the server",
    until="Prefect joins them",
)
JOIN_AT_QUERY = Patch(
    name="join-at-query",
    process="server",
    targets={"prefect.server.models.flow_runs:selectinload": "(*keys, …"},
    why="The same where Prefect says it at the query.",
    gain="14 % of the server",
    until="Prefect joins them",
)
VALID_VARIABLES = Patch(
    name="valid-variables",
    process="server",
    targets={
        "prefect.server.api.validation:is_valid_schema": "(schema, preprocess=True)",
        "prefect.server.api.validation:validate": "(obj, schema, …",
    },
    why="The job variables of a fan-out's runs are all the same, and are validated for each.",
    gain="7 % of the server",
    until="Prefect validates them once",
)
SKIP_PARENT_STATES = Patch(
    name="skip-parent-states",
    process="server",
    targets={"prefect.server.orchestration.global_policy:UpdateSubflowParentTask.after_transition": "(self, context)"},
    needs={"prefect.server.models.task_runs:read_task_run": "(db, session, task_run_id)"},
    why="Prefect copies each state of a child to the task run of its parent, also those that say nothing of it.",
    gain="16 % of the server",
    until="Prefect copies fewer",
)
READY_SELDOM = Patch(
    name="ready-seldom",
    process="server",
    targets={"docket:Docket.add": "(self, function, when=None, key=None)"},
    why="Each question for work makes two background tasks that mark queues and deployments as ready.",
    gain="4 % of the server",
    until="Prefect marks them when the mark is about to run out",
)
OFFER_WORK_POOL = Patch(
    name="offer-work-pool",
    process="server",
    targets={"prefect.server.api.collections:get_collection_view": "(view)"},
    why="The UI offers the types of work pools of Prefect's own collections alone.",
    gain="the UI can create a pool of the type warm-process",
    until="Prefect reads the types of installed workers",
)

# ── the worker ───────────────────────────────────────────────────────────────────────────────────────────────────

FORK_RUNS = Patch(
    name="fork-runs",
    process="worker",
    needs={
        "prefect.runner._flow_run_executor:FlowRunExecutor": "(*, flow_run, starter, process_manager, state_proposer, "
        "hook_runner, get_attempt_conclusion, propose_submitting=True)",
        "prefect.runner._cancellation_manager:CancellationManager": "(*, process_manager, hook_runner, "
        "state_proposer, event_emitter, client, control_channel=None)",
        "prefect.runner._cancellation_manager:CancellationManager.cancel": "(self, flow_run, …",
        "prefect.runner._cancellation_manager:CancellationManager._finalize_cancelled_state": "(self, flow_run, …",
        "prefect.runner._control_channel:ControlChannel.signal": "(self, flow_run_id, intent)",
        "prefect.runner._control_channel:ControlChannel.register": "(self, flow_run_id)",
        "prefect.runner._control_channel:ControlChannel.unregister": "(self, flow_run_id)",
        "prefect.runner._control_channel:ControlChannel.get_conclusion": "(self, flow_run_id)",
        "prefect.runner._control_channel:ControlSignalStatus.ACKNOWLEDGED.value": "'acknowledged'",
        "prefect.runner._control_channel:ControlSignalStatus.ALREADY_CONCLUDED.value": "'already_concluded'",
        "prefect.runner._event_emitter:EventEmitter": "(*, runner_name, client, …",
        "prefect.runner._process_manager:ProcessHandle": "(_process, termination_scope=…",
        "prefect.runner._process_manager:ProcessManager": "(*, on_add=None, on_remove=None)",
        "prefect.runner._process_manager:ProcessManager.kill": "(self, flow_run_id, grace_seconds=30, *, force=False)",
        "prefect.runner._process_manager:create_isolated_termination_scope": "(pid)",
        "prefect.runner._state_proposer:StateProposer.propose_crashed": "(self, flow_run, message)",
        "prefect.runner._hook_runner:HookRunner": "(*, resolve_flow)",
        "prefect.flow_engine:_main": "(argv=None)",
        "prefect.flow_engine:_load_flow_from_runtime_entrypoint": "(entrypoint)",
        "prefect.events.worker:EventsWorker.set_client_override": "(client_type, **client_kwargs)",
        "prefect.events.worker:ProcessPoolForwardingEventsClient": "(event_queue, …",
        "prefect.logging.handlers:set_api_log_sink": "(sink)",
        "prefect.logging.handlers:emit_api_log": "(log)",
    },
    why="A run is forked from a process that has imported everything, and watched with parts of Prefect's runner.",
    gain="a flow run starts in milliseconds; Prefect's worker starts three Pythons for it",
    until="Prefect's runner takes a starter",
    is_optional=False,
)
SHARE_READS = Patch(
    name="share-reads",
    process="worker",
    targets={
        "prefect.client.orchestration:PrefectClient.read_deployment": "(self, deployment_id)",
        "prefect.client.orchestration:PrefectClient.read_flow": "(self, flow_id)",
    },
    why="Prefect's worker reads the deployment twice and the flow once for each run.",
    gain="3 % of the server, 6 % of workers and runs",
    until="Prefect's worker reads them once for a claim",
)
PID_WITH_BEGIN = Patch(
    name="pid-with-begin",
    process="worker",
    targets={"prefect.client.orchestration:PrefectClient.update_flow_run": "(self, flow_run_id, …"},
    why="Prefect's worker reports the process of a run by a request of its own.",
    gain="one request of each run; its CPU time could not be told from noise",
    until="Prefect's engine reports it when it begins",
)

# ── the process of a flow run ────────────────────────────────────────────────────────────────────────────────────

TELL_PID = Patch(
    name="tell-pid",
    process="run",
    targets={
        "prefect.client.orchestration:PrefectClient.update_flow_run": "(self, flow_run_id, …",
        "prefect.client.orchestration:SyncPrefectClient.update_flow_run": "(self, flow_run_id, …",
    },
    why="The other half of pid-with-begin: the update that the engine begins with carries the process.",
    gain="see pid-with-begin",
    until="Prefect's engine reports it when it begins",
)
TLS_CONTEXT_ONCE = Patch(
    name="tls-context-once",
    process="run",
    targets={
        "prefect._internal.version_checking:ssl": "module",
        "prefect._internal.websockets:ssl": "module",
        "prefect.client.orchestration:ssl": "module",
    },
    why="Each client and socket reads the certificate authorities again.",
    gain="24 ms for each client of a run, of some 120 ms in all",
    until="Prefect keeps the context",
)
OWN_HEARTBEATS = Patch(
    name="own-heartbeats",
    process="run",
    targets={"prefect.flow_engine:_send_heartbeats": "(engine, join_on_exit=True) a81fa9dc"},
    needs={
        "prefect.flow_engine:BaseFlowRunEngine._build_heartbeat_event_template": "(self)",
        "prefect.flow_engine:BaseFlowRunEngine._emit_flow_run_heartbeat": "(self, resource=None, related=None)",
    },
    why="Prefect's look once a second whether to end, and each run waits for that look; ours also tell the worker that "
    "a flow has no hooks, and name the limit of memory.",
    gain="a run ends up to a second earlier",
    until="Prefect waits for an event",
)
HEAR_SUSPENSION = Patch(
    name="hear-suspension",
    process="run",
    targets={
        "prefect.flow_engine:observe_flow_run_suspension": "(flow_run_id, suspension_request, "
        "polling_interval=10) 370d4094"
    },
    needs={
        "prefect._flow_run_suspension:is_suspended_flow_run_state": "(state)",
        "prefect._flow_run_suspension:FlowRunSuspensionRequest.mark_requested": "(self, state)",
    },
    why="Prefect opens a subscription of events for each run, to hear of a suspension; the worker has one for all.",
    gain="10 % of the server, 9 % of workers and runs",
    until="a run can be told of a suspension by its worker",
)
KNOWN_RUN = Patch(
    name="known-run",
    process="run",
    targets={"prefect.flow_engine:load_flow_run": "(flow_run_id)"},
    why="A run reads itself, which its worker has just read.",
    gain="a request before the code of a run is loaded",
    until="Prefect takes the run from its worker",
)
KNOWN_RESULT_STORAGE = Patch(
    name="known-result-storage",
    process="run",
    targets={
        "prefect.results:_aread_server_default_result_storage_block_id": "()",
        "prefect.results:_read_server_default_result_storage_block_id": "()",
    },
    why="Each run reads the server's default for results twice.",
    gain="4 % of the process of a run, two requests",
    until="Prefect takes it from the worker",
)
KNOWN_RELATED = Patch(
    name="known-related",
    process="run",
    needs={"prefect.events.related:RESOURCE_CACHE": "dict"},
    why="Each run reads flow, deployment, queue and pool for its events, which its worker knows.",
    gain="3 % of the server, 9 % of workers and runs",
    until="Prefect takes them from the worker",
)
DESCRIBE_FLOWS_LAZILY = Patch(
    name="describe-flows-lazily",
    process="run",
    targets={"prefect.flows:parameter_schema": "(fn)", "prefect.flows:ValidatedFunction": "(function, config=None)"},
    why="Prefect makes a model and a schema for each flow of a file, also for those that this run does not call.",
    gain="12 % of the process of a run, for a file with seven flows",
    until="Prefect makes them on first use",
)

# ── a local run ──────────────────────────────────────────────────────────────────────────────────────────────────

LOCAL_TASKS = Patch(
    name="local-tasks",
    process="local",
    targets={f"prefect.task_engine:{name}": _TASK for name in ("run_task", "run_task_sync", "run_task_async")},
    why="Prefect's engine records each task at a server, and a local run has none.",
    gain="tasks of a local run",
    until="Prefect runs tasks without a server",
    is_optional=False,
)
LOCAL_FLOWS = Patch(
    name="local-flows",
    process="local",
    targets={"prefect.flow_engine:run_flow": "(flow, flow_run=None, parameters=None, …"},
    why="Prefect's engine records each flow at a server, and a local run has none.",
    gain="flows that a flow of a local run calls",
    until="Prefect runs flows without a server",
    is_optional=False,
)

PATCHES: tuple[Patch, ...] = tuple(value for value in list(vars().values()) if isinstance(value, Patch))


def list_patches() -> list[tuple[Patch, str | None]]:
    """Return each patch and why it is not applied here; None where it is. Imports what the patches are for."""
    return [(patch, why_not(patch)) for patch in PATCHES]


def list_unknown_names() -> list[str]:
    """Return what PHASEWISE_PATCHES wants to leave out although it is no patch, or none that can be left out."""
    return sorted(left_out() - {"on", "off", *(f"-{patch.name}" for patch in PATCHES if patch.is_optional)})
