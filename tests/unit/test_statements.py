from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from phasewise.statements import _remembering

READ_A_FLOW_RUN = """
import asyncio, sys
from pathlib import Path

from prefect.server.database.dependencies import set_database_config
from phasewise.server import OneWriterAtATime, create_database
from phasewise.statements import spare_statements

path = Path(sys.argv[1])
create_database(path)
set_database_config(OneWriterAtATime(f"sqlite+aiosqlite:///{path}"))

import sqlalchemy as sa
from prefect.server import models, schemas
from prefect.server.database.dependencies import provide_database_interface

spare_statements(sqlite=True)


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


asyncio.run(main())
"""


def test_a_flow_run_is_read_with_its_state_and_pool_in_one_statement(tmp_path: Path) -> None:
    # In a process of its own: it changes how the server of its process reads.
    command = [sys.executable, "-c", READ_A_FLOW_RUN, str(tmp_path / "prefect.db")]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stdout.splitlines() == ["soon the-pool 1", "soon the-pool 2"], done.stderr


def test_what_was_valid_is_not_validated_again() -> None:
    asked = []

    def validate(variables: dict[str, int], schema: dict[str, str], *, strict: bool) -> list[str]:
        asked.append(variables)
        return []

    remembering = _remembering(validate)
    for variables in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2}, {"a": 2}):
        assert remembering(variables, {"type": "object"}, strict=True) == []
    assert remembering({"a": 1, "b": 2}, {"type": "object"}, strict=False) == []

    assert asked == [{"a": 1, "b": 2}, {"a": 2}, {"a": 1, "b": 2}]


def test_what_was_not_valid_is_validated_again() -> None:
    asked = []

    def validate(variables: str) -> list[str]:
        asked.append(variables)
        if variables == "raises":
            raise LookupError
        return ["wrong"]

    remembering = _remembering(validate)
    for _ in range(2):
        assert remembering("wrong") == ["wrong"]
        with pytest.raises(LookupError):
            remembering("raises")

    assert asked == ["wrong", "raises"] * 2
