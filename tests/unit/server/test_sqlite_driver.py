from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from phasewise.server import sqlite_driver
from phasewise.server.sqlite_driver import DRIVER, _Connection


@pytest.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncEngine]:
    monkeypatch.setattr(_Connection, "_slow", set())
    with contextlib.closing(sqlite3.connect(tmp_path / "test.db")) as database:
        database.execute("create table counter (value integer)")
        database.execute("insert into counter values (0)")
        database.commit()
    engine = create_async_engine(f"{DRIVER}:///{tmp_path / 'test.db'}")

    @sa.event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None
        connection.execute("pragma busy_timeout = 0")
        connection.create_function("thread", 0, threading.get_ident)

    yield engine
    await engine.dispose()


async def ask(engine: AsyncEngine, statement: str) -> Any:
    async with AsyncSession(engine) as session:
        return (await session.execute(sa.text(statement))).all()


async def test_rows_come_as_from_any_other_driver(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(sa.text("insert into counter values (:value)"), [{"value": 1}, {"value": 2}])
        result = await session.execute(sa.text("select value from counter order by value"))
        assert (result.fetchone(), result.fetchmany(1), result.fetchall()) == ((0,), [(1,)], [(2,)])
        returned = await session.execute(sa.text("update counter set value = value + 1 returning value"))
        assert sorted(returned.scalars()) == [1, 2, 3]


async def test_what_is_locked_is_waited_for_while_the_loop_runs(engine: AsyncEngine, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "test.db", isolation_level=None)) as other:
        other.execute("begin immediate")
        writing = asyncio.create_task(ask(engine, "update counter set value = 7 returning value"))
        await asyncio.sleep(0.1)  # not possible if the statement waited in the loop's thread
        assert not writing.done()
        other.execute("commit")

    assert await writing == [(7,)]


async def test_what_stays_locked_is_given_up(
    engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_driver, "_BUSY_SECONDS", 0.05)
    with contextlib.closing(sqlite3.connect(tmp_path / "test.db", isolation_level=None)) as other:
        other.execute("begin immediate")
        with pytest.raises(sa.exc.OperationalError, match="database is locked"):
            await ask(engine, "update counter set value = 7")


async def test_a_transaction_that_read_what_is_outdated_is_not_waited_with(engine: AsyncEngine, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "test.db", isolation_level=None)) as other:
        other.execute("pragma journal_mode = wal")
        async with asyncio.timeout(20), AsyncSession(engine) as session:
            await session.execute(sa.text("begin"))
            await session.execute(sa.text("select value from counter"))
            other.execute("update counter set value = 1")
            with pytest.raises(sa.exc.OperationalError, match="database is locked"):
                await session.execute(sa.text("update counter set value = 2"))


async def test_a_statement_that_was_slow_goes_to_a_thread(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_driver, "_SLOW_SECONDS", -1.0)
    here = threading.get_ident()

    assert await ask(engine, "select thread()") == [(here,)]
    assert await ask(engine, "select thread()") != [(here,)]
    assert await ask(engine, "select thread(), 'another statement'") == [(here, "another statement")]


async def test_a_session_that_is_cancelled_leaves_its_thread_in_order(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_driver, "_SLOW_SECONDS", -1.0)
    started, goes_on = threading.Event(), threading.Event()

    def wait() -> int:
        started.set()
        return int(goes_on.wait(10))

    @sa.event.listens_for(engine.sync_engine, "checkout")
    def checkout(connection: Any, *_: object) -> None:
        connection.create_function("wait", 0, wait)

    goes_on.set()
    await ask(engine, "select wait()")
    started.clear()
    goes_on.clear()
    waiting = asyncio.create_task(ask(engine, "select wait()"))
    await asyncio.to_thread(started.wait, 10)
    waiting.cancel()
    await asyncio.sleep(0.05)
    assert not waiting.done()  # its connection is still in use
    goes_on.set()

    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await ask(engine, "select value from counter") == [(0,)]


async def test_many_rows_are_written_or_none(engine: AsyncEngine) -> None:
    statement = sa.text("insert into counter values (json(:value))")
    async with AsyncSession(engine) as session:
        with pytest.raises(sa.exc.OperationalError, match="malformed JSON"):
            await session.execute(statement, [{"value": "1"}, {"value": "broken"}])
    assert await ask(engine, "select value from counter") == [(0,)]

    async with AsyncSession(engine) as session:
        await session.execute(statement, [{"value": "1"}, {"value": "2"}])
    assert await ask(engine, "select count(*) from counter") == [(3,)]
