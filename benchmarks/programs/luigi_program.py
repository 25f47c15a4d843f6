"""The topology on Luigi: local scheduler, one forked process per task. Reads loads from stdin, answers on stdout."""

import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import luigi


class Marked(luigi.Task):
    """A task whose output is an empty file, as Luigi needs one to know that it is done."""

    folder = luigi.Parameter()
    tables = luigi.IntParameter()
    seconds = luigi.FloatParameter()

    def output(self):
        return luigi.LocalTarget(Path(self.folder) / self.task_id)

    def shared(self):
        return {"folder": self.folder, "tables": self.tables, "seconds": self.seconds}

    def run(self):
        time.sleep(self.pause())
        with self.output().open("w"):
            pass

    def pause(self):
        return self.seconds / 3


class Pre(Marked):
    pass


class Table(Marked):
    number = luigi.IntParameter()

    def pause(self):
        return self.seconds


class Cleanup(Marked):
    number = luigi.IntParameter()

    def requires(self):
        return [Table(number=number, **self.shared()) for number in range(self.tables)]


class Final(Marked):
    def requires(self):
        return [Pre(**self.shared()), *(Cleanup(number=number, **self.shared()) for number in (1, 2))]


def main() -> None:
    logging.getLogger("luigi-interface").setLevel(logging.WARNING)
    print("ready", flush=True)
    for line in sys.stdin:
        load = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            submitted = time.time()
            final = Final(folder=folder, tables=load["tables"], seconds=load["seconds"])
            # One process more than tables at once: for pre, which runs beside them.
            done = luigi.build([final], workers=load["parallel"] + 1, local_scheduler=True, log_level="WARNING")
            completed = time.time()
        if not done:
            sys.exit("the luigi run failed")
        print(json.dumps({"submitted": submitted, "completed": completed}), flush=True)


if __name__ == "__main__":
    main()
