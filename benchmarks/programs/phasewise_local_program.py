"""The topology on phasewise without a server. Reads loads from stdin, answers with times on stdout."""

import asyncio
import json
import sys
import time

from phasewise_flows import list_deployments

from phasewise.local.runs import LocalFlowRuns
from phasewise.orchestration.flow_runs import RunRequest
from phasewise.settings import Settings


async def main() -> None:
    deployments = {deployment.full_name: deployment for deployment in list_deployments()}
    limit = Settings().table_concurrency
    async with LocalFlowRuns(deployments, table_concurrency=limit) as flow_runs:
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            load = json.loads(line)
            parameters = {"tables": load["tables"], "seconds": load["seconds"]}
            submitted = time.time()
            request = RunRequest(deployment="bench-main/bench", parameters=parameters)
            [outcome] = [one async for one in flow_runs.watch(await flow_runs.submit([request]))]
            if not outcome.is_completed or outcome.ended_at is None:
                sys.exit(outcome.describe())
            print(json.dumps({"submitted": submitted, "completed": outcome.ended_at.timestamp()}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
