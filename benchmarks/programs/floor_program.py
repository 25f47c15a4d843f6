"""The floor: one bare fork per step, nothing recorded. Reads loads from stdin, answers with times on stdout."""

import json
import os
import sys
import time


def fork_step(seconds: float) -> int:
    pid = os.fork()
    if pid == 0:
        time.sleep(seconds)
        os._exit(0)
    return pid


def run(load: dict[str, float]) -> None:
    pre = fork_step(load["short"])
    left, running = int(load["tables"]), 0
    while left or running:
        while left and running < load["parallel"]:
            fork_step(load["seconds"])
            left, running = left - 1, running + 1
        if os.wait()[0] != pre:
            running -= 1
        else:
            pre = 0
    for _ in range(2):
        fork_step(load["short"])
    for _ in range(3 if pre else 2):
        os.wait()
    fork_step(load["short"])
    os.wait()


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        submitted = time.time()
        run(json.loads(line))
        print(json.dumps({"submitted": submitted, "completed": time.time()}), flush=True)


if __name__ == "__main__":
    main()
