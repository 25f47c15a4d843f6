from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from phasewise.server.requests import _run_dependency

ASK_A_SERVER = """
import asyncio, sys
from pathlib import Path

from prefect.server.database.dependencies import set_database_config
from phasewise.server.app import create_database
from phasewise.server.database import OneWriterAtATime

path = Path(sys.argv[1])
create_database(path)
set_database_config(OneWriterAtATime(f"sqlite+aiosqlite:///{path}"))

import httpx
from prefect.server.api.server import create_app
from phasewise.server.requests import shorten_requests, _applications, _DefaultContentType


async def main():
    app = create_app(final=True)
    shorten_requests(app)
    middleware = [one for api in _applications(app) for one in api.user_middleware]
    names = [getattr(one.kwargs.get("dispatch"), "__name__", "") for one in middleware]
    print([one.cls for one in middleware].count(_DefaultContentType), "default_content_type" in names)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        # As clients of Prefect before 3.6.19 do: JSON without a content type.
        old = await client.post("/api/flows/", content=b'{"name": "the-flow"}')
        new = await client.post("/api/flows/", json={"name": "the-flow"})
        form = await client.post("/api/flows/", data={"name": "the-flow"})
        print(old.status_code, new.status_code, old.json()["id"] == new.json()["id"], form.status_code)
        print((await client.get("/api/health")).json())


asyncio.run(main())
"""


def test_a_server_answers_as_before(tmp_path: Path) -> None:
    # In a process of its own: it changes how FastAPI calls dependencies.
    command = [sys.executable, "-c", ASK_A_SERVER, str(tmp_path / "prefect.db")]
    env = {**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}

    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    assert done.stdout.splitlines() == ["1 False", "201 200 True 422", "True"], done.stderr


async def test_only_what_may_wait_goes_to_a_thread() -> None:
    def identify() -> int:
        return threading.get_ident()

    assert await _run_dependency(identify) != threading.get_ident()
    identify.__module__ = "prefect.server.api.dependencies"
    assert await _run_dependency(identify) == threading.get_ident()
