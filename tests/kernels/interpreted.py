"""Groups of cases of the kernels under Triton's interpreter. Run as a program, it imports a file of cases once and runs
each group whose name it reads in a fork, so that no group sees another's state."""

import faulthandler
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HANGS = 500.0  # seconds after which a group shows where it hangs, and ends


@contextmanager
def interpreter(cases: Path) -> Iterator[Callable[[str], list[dict]]]:
    """Context with a function: the name of a group in the file `cases` -> the rows that it prints."""
    process = subprocess.Popen(
        [sys.executable, __file__, cases],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )

    def rows(group: str) -> list[dict]:
        process.stdin.write(f"{group}\n")
        process.stdin.flush()
        code, printed, errors = json.loads(process.stdout.readline())
        assert code == 0, errors
        return [json.loads(line) for line in printed.splitlines()]

    with process:
        yield rows
        process.stdin.close()


def serve(cases: str) -> None:
    """Answers each name of a group, a line of standard input, by its exit code, standard output and standard error."""
    spec = importlib.util.spec_from_file_location(Path(cases).stem, cases)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                os._exit(_run(getattr(module, line.strip())))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read())
        print(json.dumps([code, *texts]), flush=True)


def _run(group: Callable[[], None]) -> int:
    faulthandler.dump_traceback_later(HANGS, exit=True)
    try:
        group()
        sys.stdout.flush()
        return 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1


if __name__ == "__main__":
    serve(sys.argv[1])
