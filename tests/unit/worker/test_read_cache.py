from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel

from phasewise.worker.read_cache import Reads


class Found(BaseModel):
    id: UUID
    names: list[str]


class Server:
    def __init__(self) -> None:
        self.asked: list[UUID] = []
        self.is_away = False

    async def read(self, id_: UUID) -> Found:
        self.asked.append(id_)
        await asyncio.sleep(0)
        if self.is_away:
            raise ConnectionError
        return Found(id=id_, names=["a"])


async def test_runs_of_a_claim_share_a_read_and_may_change_what_they_got() -> None:
    server, reads, wanted = Server(), Reads(), uuid4()

    first, second = await asyncio.gather(*(reads.share(server.read, wanted) for _ in range(2)))
    first.names.append("b")
    third = await reads.share(server.read, wanted)

    assert server.asked == [wanted]
    assert second.names == third.names == ["a"]


async def test_the_next_claim_reads_anew_unless_it_was_said_to_hold() -> None:
    now = [0.0]
    server, reads, deployment, flow = Server(), Reads(clock=lambda: now[0]), uuid4(), uuid4()

    for _ in range(3):
        reads.begin()
        await reads.share(server.read, deployment)
        await reads.share(server.read, flow, seconds=5)
        now[0] += 4

    assert server.asked == [deployment, flow, deployment, deployment, flow]


async def test_a_failure_is_not_kept() -> None:
    server, reads, wanted = Server(), Reads(), uuid4()
    server.is_away = True
    with pytest.raises(ConnectionError):
        await reads.share(server.read, wanted, seconds=5)
    server.is_away = False

    assert (await reads.share(server.read, wanted, seconds=5)).id == wanted
    assert server.asked == [wanted, wanted]
