"""The topology on Airflow: one DAG per load in BENCHMARK_LOADS, a JSON list of {name, tables, seconds}."""

import json
import os
import time

from airflow.sdk import dag, task


def make_dag(name: str, tables: int, seconds: float) -> None:
    @task
    def pause(length: float) -> None:
        time.sleep(length)

    def step(step_name: str, length: float):
        return pause.override(task_id=step_name)(length)

    @dag(dag_id=name, schedule=None, catchup=False)
    def topology():
        loaded = [step(f"table_{number}", seconds) for number in range(tables)]
        cleanups = [step(f"cleanup{number}", seconds / 3) for number in (1, 2)]
        final = step("final", seconds / 3)
        for cleanup in cleanups:
            loaded >> cleanup
        [step("pre", seconds / 3), *cleanups] >> final

    topology()


for load in json.loads(os.environ["BENCHMARK_LOADS"]):
    make_dag(load["name"], load["tables"], load["seconds"])
