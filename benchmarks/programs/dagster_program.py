"""The topology on Dagster: multiprocess executor, forkserver preloaded. Reads loads from stdin, answers on stdout."""

import json
import sys
import time

from dagster import DagsterInstance, In, Nothing, Out, execute_job, job, multiprocess_executor, op
from dagster._core.definitions.reconstruct import build_reconstructable_job


def make_job(tables: int, seconds: float):
    def sleep(pause: float):
        def compute() -> None:
            time.sleep(pause)

        return compute

    short = seconds / 3
    pre = op(name="pre", out=Out(Nothing))(sleep(short))
    steps = [op(name=f"table_{number}", out=Out(Nothing))(sleep(seconds)) for number in range(tables)]
    cleanups = [op(name=f"cleanup{n}", ins={"after": In(Nothing)}, out=Out(Nothing))(sleep(short)) for n in (1, 2)]
    final = op(name="final", ins={"after": In(Nothing)}, out=Out(Nothing))(sleep(short))

    @job(name="topology", executor_def=multiprocess_executor)
    def topology():
        loaded = [step() for step in steps]
        final([pre(), *(cleanup(loaded) for cleanup in cleanups)])

    return topology


def main() -> None:
    print("ready", flush=True)
    with DagsterInstance.get() as instance:
        for line in sys.stdin:
            load = json.loads(line)
            # One process more than tables at once: for pre, which runs beside them.
            config = {
                "max_concurrent": load["parallel"] + 1,
                "start_method": {"forkserver": {"preload_modules": ["dagster", "dagster_program"]}},
            }
            topology = build_reconstructable_job(
                "dagster_program", "make_job", reconstructable_args=(load["tables"], load["seconds"])
            )
            result = execute_job(topology, instance=instance, run_config={"execution": {"config": config}})
            if not result.success:
                sys.exit("the dagster run failed")
            record = instance.get_run_record_by_id(result.run_id)
            answer = {"submitted": record.create_timestamp.timestamp(), "completed": record.end_time}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
