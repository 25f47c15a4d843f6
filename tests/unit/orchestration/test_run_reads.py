from __future__ import annotations

from itertools import islice

import pytest

from phasewise.orchestration.run_reads import READ_SIZE, iterate_pages, read_pages


class Server:
    """Answers as the API does: a page of at most 200, whatever is asked for."""

    def __init__(self, count: int) -> None:
        self.rows = list(range(count))
        self.reads: list[tuple[int, str]] = []

    def read(self, *, limit: int, offset: int, wanted: str) -> list[int]:
        self.reads.append((offset, wanted))
        return self.rows[offset : offset + min(limit, 200)]

    async def read_async(self, *, limit: int, offset: int, wanted: str) -> list[int]:
        return self.read(limit=limit, offset=offset, wanted=wanted)


@pytest.mark.parametrize("count", [0, 1, 199, 200, 201, 400, 450])
async def test_all_pages_are_read_once_and_in_order(count: int) -> None:
    server, other = Server(count), Server(count)

    assert await read_pages(server.read_async, wanted="mine") == server.rows
    assert list(iterate_pages(other.read, wanted="mine")) == server.rows

    assert server.reads == other.reads == [(offset, "mine") for offset in range(0, count + 1, READ_SIZE)]


def test_no_page_is_read_that_is_not_asked_for() -> None:
    server = Server(1000)

    assert list(islice(iterate_pages(server.read, wanted="mine"), 201)) == list(range(201))

    assert [offset for offset, _ in server.reads] == [0, 200]
