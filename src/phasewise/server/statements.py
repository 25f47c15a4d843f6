"""What the embedded server need not ask its database for, or do again. Runs in the server's process.

Nothing of it changes what the server answers, but for the states of the task runs that stand for flow runs.
"""

from __future__ import annotations

import functools
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Self
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import ORMExecuteState, Session, joinedload
from sqlalchemy.orm.interfaces import ORMOption

from phasewise.patches import entries
from phasewise.patches.registry import apply, find_target, may_apply, rebind
from phasewise.project.pipeline import FAN_OUT_TAG

#: Valid job variables that are remembered: one for each deployment and set of variables.
_REMEMBERED = 256
#: Types of the states of a run that has not begun; None before the first.
_WAITING = {None, "SCHEDULED", "PENDING"}
#: Types of the states of a run with which nothing is wrong.
_AS_PLANNED = {*_WAITING, "RUNNING", "COMPLETED"}
#: Seconds for which queues and deployments that a worker has asked about count as marked ready. The server forgets it
#: after 60.
_READY_SECONDS = 5.0


def spare_statements(*, on_sqlite: bool) -> None:
    """Make the server of this process answer with fewer statements; before its first one."""
    apply(entries.VALID_VARIABLES, remembering)
    apply(entries.SKIP_PARENT_STATES, _skipping_what_a_parent_need_not_see)
    apply(entries.READY_SELDOM, _adding_marks_seldom)
    if on_sqlite:
        _join_single_objects()  # PostgreSQL refuses to lock the rows of an outer join, which the server asks it for
        _pass_rows_as_parameters()


def _join_single_objects() -> None:
    """Read the state, queue and pool of a run in the statement that reads the run, not in one more for each."""
    joined = (("lazy", "joined"),)
    if may_apply(entries.JOIN_SINGLE_OBJECTS):
        for path in entries.JOIN_SINGLE_OBJECTS.targets:
            relationship, _ = find_target(path)
            rebind(relationship, "lazy", "joined")
            rebind(relationship, "strategy_key", joined)
            rebind(relationship, "strategy", relationship._get_strategy(joined))
    apply(entries.JOIN_AT_QUERY, lambda _: _Joined)


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


def _pass_rows_as_parameters() -> None:
    if not may_apply(entries.INSERT_ROWS):
        return
    from prefect.server.database.dependencies import set_query_components
    from prefect.server.database.query_components import AioSqliteQueryComponents

    class RowsAsParameters(AioSqliteQueryComponents):
        def insert(self, obj: Any) -> sqlite.Insert:
            return _Insert.into(obj)

    set_query_components(RowsAsParameters())
    sa.event.listen(Session, "do_orm_execute", _insert_rows)


def _insert_rows(execution: ORMExecuteState) -> sa.Result[Any] | None:
    if not isinstance(execution.statement, _Insert) or execution.statement.rows is None:
        return None
    execution.parameters = execution.statement.rows
    return execution.invoke_statement()


def _skipping_what_a_parent_need_not_see(copy_state: Callable[..., Any]) -> Callable[..., Any]:
    """Do not copy to the task run of a parent how its child waits, nor how one of a fan-out begins and completes.

    Prefect copies each state, which is a fifth of what a state costs. This task run does not run while its child
    waits; the one of a fan-out runs while any of them does, and its parent sets its state at the end.
    """
    from prefect.server.models import task_runs

    read_task_run: Any = task_runs.read_task_run  # its types lack what Prefect's decorator does
    fan_outs: OrderedDict[UUID, bool] = OrderedDict()

    async def stands_for_many(session: Any, task_run_id: UUID) -> bool:
        if task_run_id not in fan_outs:
            task_run = await read_task_run(session, task_run_id)
            fan_outs[task_run_id] = task_run is not None and FAN_OUT_TAG in task_run.tags
            if len(fan_outs) > _REMEMBERED:
                fan_outs.popitem(last=False)
        return fan_outs[task_run_id]

    async def after_transition(self: Any, context: Any) -> None:
        link: UUID | None = context.run.parent_task_run_id
        if link is None or {context.initial_state_type, context.validated_state_type} <= _WAITING:
            return
        if context.validated_state_type in _AS_PLANNED and await stands_for_many(context.session, link):
            return
        await copy_state(self, context)

    return after_transition


def _adding_marks_seldom(add: Callable[..., Any]) -> Callable[..., Any]:
    """Mark queues and their deployments as ready every few seconds, not each time that a worker asks for work.

    The server does that in the background, for each by a task of its own with two transactions.
    """
    from prefect.server.models.deployments import mark_deployments_ready
    from prefect.server.models.work_queues import mark_work_queues_ready

    marked: OrderedDict[tuple[str | None, str], float] = OrderedDict()

    @functools.wraps(add)
    def add_seldom(self: Any, function: Any, when: Any = None, key: str | None = None) -> Any:
        schedule: Any = add(self, function, when, key)
        if function not in (mark_deployments_ready, mark_work_queues_ready):
            return schedule

        async def schedule_seldom(**which: Any) -> Any:
            asked = key, json.dumps(which, default=str)  # ids of asyncpg are of a class of its own
            now = time.monotonic()
            if marked.get(asked, 0) > now:
                return None
            marked[asked] = now + _READY_SECONDS
            if len(marked) > _REMEMBERED:
                marked.popitem(last=False)
            return await schedule(**which)

        return schedule_seldom

    return add_seldom


def remembering(check: Callable[..., Any]) -> Callable[..., Any]:
    """Return *check* that is not called again with what it had nothing to say to."""
    passed: OrderedDict[str, None] = OrderedDict()

    @functools.wraps(check)
    def check_once(*args: Any, **options: Any) -> Any:
        try:
            question = json.dumps((args, options), sort_keys=True)
        except (TypeError, ValueError):  # no JSON, or keys that have no order
            return check(*args, **options)
        if question in passed:
            passed.move_to_end(question)
            return []
        if found := check(*args, **options):
            return found
        passed[question] = None
        if len(passed) > _REMEMBERED:
            passed.popitem(last=False)
        return found

    return check_once
