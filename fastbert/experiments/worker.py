"""A process that takes one job after the other: `python -m fastbert.experiments.worker`, started by `local`.

Jobs come as lines of JSON on standard input and outcomes leave on standard output. When the input ends, because the
sweep is over or was killed, the process ends at once, in the middle of a job too.
"""

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path

from fastbert.experiments.jobs import run_job
from fastbert.records import json_text


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the sweep ends this one
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints does not disturb the answers
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while True:
        asked = json.loads(jobs.get())
        outcome = run_job(asked["job"], Path(asked["folder"]))
        answers.write(json_text(outcome) + "\n")
        answers.flush()


def _listen(jobs: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
