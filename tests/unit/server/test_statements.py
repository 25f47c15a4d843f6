from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from phasewise.server import statements

USE_A_SERVERS_DATABASE = """
import asyncio, sys
from pathlib import Path
from uuid import uuid4

from prefect.server.database.dependencies import set_database_config
from phasewise.server.app import create_database
from phasewise.server.database import OneWriterAtATime
from phasewise.server.statements import spare_statements

path = Path(sys.argv[1])
create_database(path)
set_database_config(OneWriterAtATime(f"sqlite+aiosqlite:///{path}"))

import sqlalchemy as sa
from prefect.server import models, schemas
from prefect.server.schemas.actions import LogCreate
from prefect.server.schemas.states import AwaitingRetry, Completed, Failed, Pending, Running
from prefect.types._datetime import now
from prefect.server.database.dependencies import provide_database_interface

spare_statements(on_sqlite=True)


async def main():
    db = provide_database_interface()
    statements = []
    async with db.session_context(begin_transaction=True) as session:
        pool = await models.workers.create_work_pool(session, schemas.actions.WorkPoolCreate(name="the-pool"))
        flow = await models.flows.create_flow(session, schemas.core.Flow(name="the-flow"))
        run = await models.flow_runs.create_flow_run(
            session,
            schemas.core.FlowRun(
                flow_id=flow.id, work_queue_id=pool.default_queue_id, state=schemas.states.Pending(message="soon")
            ),
        )
    engine = await db.engine()
    sa.event.listen(engine.sync_engine, "before_cursor_execute", lambda *of: statements.append(of[2]))
    async with db.session_context() as session:
        found = await models.flow_runs.read_flow_run(session, run.id)
        print(found.state.message, found.work_queue.work_pool.name, len(statements))
        [found] = await models.flow_runs.read_flow_runs(session)
        print(found.state.message, found.work_queue.work_pool.name, len(statements))


    async with db.session_context(begin_transaction=True) as session:
        states = [Pending, Pending, Running, AwaitingRetry, Pending, Running, Failed, AwaitingRetry, Running, Completed]
        for tags in [[], ["phasewise.fan-out"]]:
            task_run = await models.task_runs.create_task_run(
                session, schemas.core.TaskRun(flow_run_id=run.id, task_key="link", dynamic_key=str(tags), tags=tags)
            )
            child = await models.flow_runs.create_flow_run(
                session,
                schemas.core.FlowRun(
                    flow_id=flow.id, parent_task_run_id=task_run.id, state=schemas.states.Scheduled(message="0")
                ),
            )
            for number, state in enumerate(states, 1):
                await models.flow_runs.set_flow_run_state(session, child.id, state(message=str(number)), force=True)
            shown = await models.task_run_states.read_task_run_states(session, task_run.id)
            by_number = sorted(shown, key=lambda one: int(one.message))
            print(*(f"{one.message} {one.name}" for one in by_number), sep=", ")

    statements.clear()
    async with db.session_context() as session:
        logs = [LogCreate(name="a", level=20, message=text, timestamp=now("UTC"), flow_run_id=run.id) for text in "xyz"]
        await models.logs.create_logs(session, logs)
        await models.logs.create_logs(session, logs[:2])
        print(len(set(statements)), len(await models.logs.read_logs(session, None)))
        try:
            twice = schemas.core.Log(**logs[0].model_dump()).model_dump(exclude={"created", "updated"})
            await session.execute(db.queries.insert(db.Log).values([twice, twice]))
        except Exception as exc:
            print(type(exc).__name__)
    async with db.session_context() as session:
        print(len(await models.logs.read_logs(session, None)))


asyncio.run(main())
"""


def test_a_flow_run_is_read_with_its_state_and_pool_in_one_statement(tmp_path: Path) -> None:
    # In a process of its own: it changes how the server of its process reads.
    command = [sys.executable, "-c", USE_A_SERVERS_DATABASE, str(tmp_path / "prefect.db")]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stdout.splitlines()[:2] == ["soon the-pool 1", "soon the-pool 2"], done.stderr
    # And the task run of its parent is told of its child's states but for those before Running; that of a fan-out,
    # which its parent keeps, is told of what went wrong.
    assert done.stdout.splitlines()[2:4] == [
        "3 Running, 4 AwaitingRetry, 6 Running, 7 Failed, 8 AwaitingRetry, 9 Running, 10 Completed",
        "7 Failed",
    ]
    # And rows of any number are one statement, outside of transactions too, where all or none are written.
    assert done.stdout.splitlines()[4:] == ["1 5", "IntegrityError", "5"], done.stderr


def test_what_was_valid_is_not_validated_again() -> None:
    asked = []

    def validate(variables: dict[str, int], schema: dict[str, str], *, strict: bool) -> list[str]:
        asked.append(variables)
        return []

    check = statements.remembering(validate)
    for variables in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2}, {"a": 2}):
        assert check(variables, {"type": "object"}, strict=True) == []
    assert check({"a": 1, "b": 2}, {"type": "object"}, strict=False) == []

    assert asked == [{"a": 1, "b": 2}, {"a": 2}, {"a": 1, "b": 2}]


@pytest.mark.parametrize("limit", [10**20, float("nan"), {1, 2}])
def test_what_json_does_not_know_is_validated(limit: object) -> None:
    asked = []
    check = statements.remembering(lambda schema: asked.append(schema) or [])

    for value in (limit, None):
        assert check({"default": value}) == []

    assert asked == [{"default": limit}, {"default": None}]


def test_what_was_not_valid_is_validated_again() -> None:
    asked = []

    def validate(variables: str) -> list[str]:
        asked.append(variables)
        if variables == "raises":
            raise LookupError
        return ["wrong"]

    check = statements.remembering(validate)
    for _ in range(2):
        assert check("wrong") == ["wrong"]
        with pytest.raises(LookupError):
            check("raises")

    assert asked == ["wrong", "raises"] * 2


MARK_READY = """
import asyncio
from uuid import UUID, uuid4

import docket
from phasewise.server import statements
from prefect.server.models.deployments import mark_deployments_ready
from prefect.server.models.work_queues import mark_work_queues_ready

scheduled = []


def add(self, function, when=None, key=None):
    async def schedule(**which):
        scheduled.append((function.__name__, key))

    return schedule


docket.Docket.add = statements._adding_marks_seldom(add)


class AnotherUUID(UUID):
    "Of a driver of its own, as asyncpg's."


async def main():
    of_pool = docket.Docket.add(None, mark_deployments_ready, key="pool")
    queue = uuid4()
    await of_pool(work_queue_ids=[AnotherUUID(str(queue))])
    await of_pool(work_queue_ids=[AnotherUUID(str(queue))])
    await of_pool(work_queue_ids=[AnotherUUID(str(uuid4()))])
    statements._READY_SECONDS = -1  # from now on a mark is old at once
    await of_pool(work_queue_ids=[uuid4()])
    await docket.Docket.add(None, mark_work_queues_ready, key="pool")(polled_work_queue_ids=[queue])
    for _ in range(2):
        await docket.Docket.add(None, main, key="other")(value=object())
    print(len(scheduled), scheduled[-1])


asyncio.run(main())
"""


def test_queues_are_marked_ready_again_only_after_a_while_or_when_there_are_others() -> None:
    done = subprocess.run([sys.executable, "-c", MARK_READY], capture_output=True, text=True, check=False)

    assert done.stdout.split(" ", 1) == ["6", "('main', 'other')\n"], done.stderr
