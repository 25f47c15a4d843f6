"""What a Prefect server in our hands need not ask its database for, or do again, at each request.

Nothing of it changes what the server answers, but for the states of the task runs that stand for flow runs. Measured
with Prefect 3.8.8: a flow run takes 170 statements without these and 50 with them.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Self
from uuid import UUID

import jsonschema
import orjson
import sqlalchemy as sa
from docket import Docket
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from prefect.server.api import validation
from prefect.server.database import dependencies, orm_models
from prefect.server.database.query_components import AioSqliteQueryComponents
from prefect.server.events.storage import database as storage
from prefect.server.models import flow_runs, task_runs
from prefect.server.models.deployments import mark_deployments_ready
from prefect.server.models.work_queues import mark_work_queues_ready
from prefect.server.orchestration.global_policy import UpdateSubflowParentTask
from prefect.server.schemas.states import StateType
from prefect.server.services import task_run_recorder
from prefect.server.utilities import database
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper, ORMExecuteState, RelationshipDirection, Session, joinedload
from sqlalchemy.orm.interfaces import ORMOption

from phasewise.project.pipeline import FAN_OUT_TAG

#: Valid job variables that are remembered: one for each deployment and set of variables.
_REMEMBERED = 256
#: Types of the states of a run that has not begun; None before the first.
_WAITING = {None, StateType.SCHEDULED, StateType.PENDING}
#: Types of the states of a run with which nothing is wrong.
_AS_PLANNED = {*_WAITING, StateType.RUNNING, StateType.COMPLETED}
#: Seconds for which queues and deployments that a worker has asked about count as marked ready. The server forgets it
#: after 60.
_READY_SECONDS = 5.0


def spare_statements(*, on_sqlite: bool) -> None:
    """Make the server of this process answer with fewer statements; before its first one."""
    _declare_operators()
    _remember_valid_variables()
    _check_schemas_once()
    _skip_what_a_parent_need_not_see()
    # Which database it is, is worked out from the URL at each use of it.
    setattr(dependencies, "get_dialect", functools.cache(database.get_dialect))  # noqa: B010
    _mark_ready_seldom()
    if on_sqlite:
        _join_single_objects()  # PostgreSQL refuses to lock the rows of an outer join, which the server asks it for
        setattr(AioSqliteQueryComponents, "insert", lambda _, model: _Insert.into(model))  # noqa: B010
        sa.event.listen(Session, "do_orm_execute", _insert_rows)
        for module in (storage, task_run_recorder):  # that split the rows of one INSERT by what SQLite took before 3.32
            setattr(module, "get_max_query_parameters", functools.cache(_count_parameters))  # noqa: B010


def _join_single_objects() -> None:
    """Read the state, queue and pool of a run in the statement that reads the run, not in one more for each."""
    for model in (orm_models.FlowRun, orm_models.TaskRun, orm_models.Deployment, orm_models.WorkQueue):
        mapper: Mapper[Any] = sa.inspect(model)
        for relationship in mapper.relationships:
            if relationship.lazy == "selectin" and relationship.direction is RelationshipDirection.MANYTOONE:
                relationship.lazy = "joined"
                relationship.strategy_key = (("lazy", "joined"),)
                relationship.strategy = relationship._get_strategy(relationship.strategy_key)
    setattr(flow_runs, "selectinload", _Joined)  # noqa: B010 - where Prefect says it at the query


class _Joined:
    """``selectinload(a).selectinload(b)``, as Prefect writes it, that joins."""

    def __init__(self, attribute: Any) -> None:
        self._attribute = attribute

    def selectinload(self, attribute: Any) -> ORMOption:
        return joinedload(self._attribute).joinedload(attribute)


class _Insert(sqlite.Insert):
    """An INSERT to which many rows are parameters.

    Prefect writes events, logs and states of task runs as one statement with all their values in it, which SQLAlchemy
    compiles anew for each: a seventh of what the server did.
    """

    inherit_cache = True
    _table: sa.Table
    rows: list[dict[str, Any]] | None = None

    @classmethod
    def into(cls, model: Any) -> Self:
        statement = cls(model)
        statement._table = getattr(model, "__table__", model)
        return statement

    def values(self, *args: Any, **kwargs: Any) -> Self:
        rows = args[0] if len(args) == 1 else None
        if not isinstance(rows, list) or not rows or any(row.keys() != rows[0].keys() for row in rows):
            return super().values(*args, **kwargs)
        # Of the table and not of the model: the unit of work would look at each row, and leave out what is None.
        statement = type(self)(self._table)
        statement.rows = rows
        return statement


def _insert_rows(execution: ORMExecuteState) -> sa.Result[Any] | None:
    if not isinstance(execution.statement, _Insert) or execution.statement.rows is None:
        return None
    execution.parameters = execution.statement.rows
    return execution.invoke_statement()


def _count_parameters() -> int:
    """Return how many parameters a statement may have."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        return connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)


def _declare_operators() -> None:
    """Say which operators Prefect's column types have: SQLAlchemy 2.1 warns at each use of one that does not."""
    operators = getattr(sa.sql.operators, "OperatorClass", None)
    if operators is not None:
        for column_type in (database.UUID, database.Timestamp, database.JSON, database.Pydantic):
            column_type.operator_classes = operators.ANY


def _remember_valid_variables() -> None:
    """Validate the job variables of a fan-out's runs, which are all the same, once and not for each run."""
    for name in ("is_valid_schema", "validate"):
        setattr(validation, name, _remembering(getattr(validation, name)))


def _check_schemas_once() -> None:
    """Do not check the schema of a deployment's parameters for the parameters of each run."""
    checks = functools.cache(lambda validator: _remembering(validator.check_schema))

    # As jsonschema's own, but for the memory.
    def validate(instance: Any, schema: Any, cls: Any = None, *args: Any, **options: Any) -> None:
        validator = cls or validator_for(schema)
        checks(validator)(schema)
        if error := best_match(validator(schema, *args, **options).iter_errors(instance)):
            raise error

    setattr(jsonschema, "validate", validate)  # noqa: B010


def _skip_what_a_parent_need_not_see() -> None:
    """Do not copy to the task run of a parent how its child waits, nor how one of a fan-out begins and completes.

    Prefect copies each state, which is a fifth of what a state costs. This task run does not run while its child
    waits; the one of a fan-out runs while any of them does, and its parent sets its state at the end.
    """
    copy_state = UpdateSubflowParentTask.after_transition
    read_task_run: Any = task_runs.read_task_run
    fan_outs: OrderedDict[UUID, bool] = OrderedDict()

    async def stands_for_many(session: AsyncSession, task_run_id: UUID) -> bool:
        if task_run_id not in fan_outs:
            task_run = await read_task_run(session, task_run_id)
            fan_outs[task_run_id] = task_run is not None and FAN_OUT_TAG in task_run.tags
            if len(fan_outs) > _REMEMBERED:
                fan_outs.popitem(last=False)
        return fan_outs[task_run_id]

    async def after_transition(self: UpdateSubflowParentTask, context: Any) -> None:
        link: UUID | None = context.run.parent_task_run_id
        if link is None or {context.initial_state_type, context.validated_state_type} <= _WAITING:
            return
        if context.validated_state_type in _AS_PLANNED and await stands_for_many(context.session, link):
            return
        await copy_state(self, context)

    setattr(UpdateSubflowParentTask, "after_transition", after_transition)  # noqa: B010


def _mark_ready_seldom() -> None:
    """Mark queues and their deployments as ready every few seconds, not each time that a worker asks for work.

    The server does that in the background, for each by a task of its own with two transactions.
    """
    add = Docket.add
    marked: OrderedDict[tuple[str | None, bytes], float] = OrderedDict()

    @functools.wraps(add)
    def add_seldom(self: Docket, function: Any, when: Any = None, key: str | None = None) -> Any:
        schedule: Any = add(self, function, when, key)
        if function not in (mark_deployments_ready, mark_work_queues_ready):
            return schedule

        async def schedule_seldom(**which: Any) -> Any:
            asked = key, orjson.dumps(which, default=str)  # ids of asyncpg are of a class of its own
            now = time.monotonic()
            if marked.get(asked, 0) > now:
                return None
            marked[asked] = now + _READY_SECONDS
            if len(marked) > _REMEMBERED:
                marked.popitem(last=False)
            return await schedule(**which)

        return schedule_seldom

    setattr(Docket, "add", add_seldom)  # noqa: B010


def _remembering(check: Callable[..., Any]) -> Callable[..., Any]:
    """Return *check* that is not called again with what it had nothing to say to."""
    passed: OrderedDict[bytes, None] = OrderedDict()

    @functools.wraps(check)
    def remembering(*args: Any, **options: Any) -> Any:
        question = orjson.dumps((args, options), option=orjson.OPT_SORT_KEYS)
        if question in passed:
            passed.move_to_end(question)
            return []
        if found := check(*args, **options):
            return found
        passed[question] = None
        if len(passed) > _REMEMBERED:
            passed.popitem(last=False)
        return found

    return remembering
