from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from phasewise.server.app import create_database
from phasewise.server.database import OneWriterAtATime


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[OneWriterAtATime]:
    database = OneWriterAtATime(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    engine = await database.engine()
    session = await database.session(engine)
    async with session, database.begin_transaction(session):
        await session.execute(sa.text("create table counter (value integer)"))
        await session.execute(sa.text("insert into counter values (0)"))
    yield database
    await engine.dispose()


async def test_transactions_that_read_and_then_write_never_collide(database: OneWriterAtATime) -> None:
    engine = await database.engine()

    async def increment() -> None:
        session = await database.session(engine)
        async with session, database.begin_transaction(session):
            value = (await session.execute(sa.text("select value from counter"))).scalar_one()
            await asyncio.sleep(0)  # let the others read, too: deferred, all but one of them would be locked out
            await session.execute(sa.text("update counter set value = :value"), {"value": value + 1})

    await asyncio.gather(*(increment() for _ in range(20)))

    session = await database.session(engine)
    async with session:
        assert (await session.execute(sa.text("select value from counter"))).scalar_one() == 20


async def test_a_transaction_within_a_transaction_does_not_wait_for_itself(database: OneWriterAtATime) -> None:
    engine = await database.engine()
    outer, inner = await database.session(engine), await database.session(engine)

    async with asyncio.timeout(5), outer, inner, database.begin_transaction(outer), database.begin_transaction(inner):
        assert (await inner.execute(sa.text("select value from counter"))).scalar_one() == 0


async def test_a_transaction_that_fails_lets_the_next_one_in(database: OneWriterAtATime) -> None:
    engine = await database.engine()
    session = await database.session(engine)
    async with session:
        with contextlib.suppress(RuntimeError):
            async with database.begin_transaction(session):
                await session.execute(sa.text("update counter set value = 7"))
                raise RuntimeError

        async with asyncio.timeout(5), database.begin_transaction(session):
            assert (await session.execute(sa.text("select value from counter"))).scalar_one() == 0


def test_a_new_database_names_the_revision_that_prefect_migrates_on_from(tmp_path: Path) -> None:
    path = tmp_path / "prefect" / "prefect.db"

    create_database(path)

    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert len(connection.execute("select version_num from alembic_version").fetchall()) == 1
        assert connection.execute("select count(*) from flow_run").fetchall() == [(0,)]
    assert [file.name for file in path.parent.iterdir()] == ["prefect.db"]


def test_an_existing_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "prefect.db"
    path.write_bytes(b"as it was")

    create_database(path)

    assert path.read_bytes() == b"as it was"


async def test_a_transaction_may_read_through_a_second_session(database: OneWriterAtATime) -> None:
    engine = await database.engine()
    outer, inner = await database.session(engine), await database.session(engine)

    async with outer, database.begin_transaction(outer), asyncio.timeout(10):
        await outer.execute(sa.text("update counter set value = 5"))
        async with inner:
            value = (await inner.execute(sa.text("select value from counter"))).scalar_one()

    assert value == 0
