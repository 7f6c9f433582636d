"""Worker process that runs one job after another: `python -m fastbert.studies.engine.worker`, started by `local`.

Jobs are read as lines of JSON from standard input, and outcomes are written to standard output. When the input ends,
because the study has finished or was killed, the process ends immediately, even during a job.
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
    os.dup2(2, 1)  # other output goes to standard error
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while True:
        request = json.loads(jobs.get())
        outcome = run_job(request["job"], Path(request["folder"]))
        try:
            answers.write(json_text(outcome) + "\n")
            answers.flush()
        except BrokenPipeError:  # the study has ended; it will run the job again
            os._exit(0)


def _listen(jobs: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
