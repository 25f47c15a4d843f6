"""Deploy the flows, or run main_etl: ``python flows/prefect_flow-worker-flow-v2.py deploy|run``."""

import sys

from phasewise.cli.app import deploy, run, run_command

COMMANDS = {"deploy": deploy, "run": run}

USAGE = f"""usage: python {sys.argv[0]} deploy|run

  deploy   create or update the seven deployments (and the work pool, PREFECT_WORK_POOL)
  run      run main_etl in this process, its subflows through the work pool
"""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in COMMANDS:
        print(USAGE, file=sys.stderr)
        return 2
    return run_command(COMMANDS[arguments[0]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
