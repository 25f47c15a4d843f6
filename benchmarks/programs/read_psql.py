"""``psql``'s binary COPY to /dev/null: what the server and the protocol alone cost. Nothing is written or counted."""

import subprocess

from reading import Job, run


def read(job: Job) -> int:
    copy = f"\\copy {job.table} to '/dev/null' (format binary)"
    done = subprocess.run(["psql", "-X", "-c", copy, job.address], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[1])


run(read)
