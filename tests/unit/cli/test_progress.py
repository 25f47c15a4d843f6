"""Following a run when its server goes away; following one that runs is tested with the command."""

from __future__ import annotations

from typing import Any, NoReturn
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun

from phasewise.cli import progress
from phasewise.cli.progress import run_deployment
from phasewise.errors import ServerUnreachable


class NoServer:
    def read_deployment_by_name(self, _name: str) -> Any:
        return FlowRun(id=uuid4(), flow_id=uuid4())  # all that is looked at is its id

    def create_flow_run_from_deployment(self, _id: object, *, name: str, job_variables: object) -> FlowRun:
        assert job_variables == {"env": {}}
        return FlowRun(id=uuid4(), flow_id=uuid4(), name=name)

    def set_flow_run_state(self, *_: object) -> NoReturn:
        raise httpx.ConnectError("refused")

    def __enter__(self) -> NoServer:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_server_that_does_not_come_back_ends_the_wait_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_run_id: str) -> NoReturn:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(progress, "get_client", lambda **_: NoServer())
    monkeypatch.setattr(progress, "read_batch_runs", refuse)
    monkeypatch.setattr(progress, "_PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.01)

    with pytest.raises(ServerUnreachable, match="phasewise resume"):
        run_deployment("main-etl-job/main-etl-deployment", environment={}, show=lambda _: None)
