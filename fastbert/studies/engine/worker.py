"""A process that takes one job after the other: `python -m fastbert.studies.engine.worker`, started by `local`.

Jobs come as lines of JSON on standard input and outcomes leave on standard output. When the input ends, because the
study is over or was killed, the process ends at once, in the middle of a job too.
"""

import json
import os
import queue
import sys
import threading
from pathlib import Path

from fastbert.records import json_text
from fastbert.streams import prepare_streams
from fastbert.studies.engine.jobs import run_job


def main() -> None:
    prepare_streams()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints does not disturb the answers
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while True:
        asked = json.loads(jobs.get())
        outcome = run_job(asked["job"], Path(asked["folder"]))
        try:
            answers.write(json_text(outcome) + "\n")
            answers.flush()
        except BrokenPipeError:  # the study is gone; it runs the job again
            os._exit(0)


def _listen(jobs: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
