"""Real kills at every operation on files: a forked process ends itself by SIGKILL just before the n-th. And a reader of
a FIFO, which ends with the test."""

import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")


def in_child(action: Callable[[], object], before: Callable[[], object] = lambda: None) -> int:
    """The exit code of `action` in a process of its own, 1 if it raises; -N where signal N ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        before()
        code = action()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(int(code or 0))


def killed_before(number: int, below: Path) -> None:
    """From now on this process dies before it makes its `number`-th change to what lies in `below`."""
    done = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal done
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in CHANGES) and str(arguments[0]).startswith(str(below)):
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def kills(action: Callable[[], object], below: Path) -> Iterator[int]:
    """Yields after `action` was killed before its first change to what lies in `below`, its second, and so on; ends
    when it came to its end."""
    for number in itertools.count(1):
        code = in_child(action, partial(killed_before, number, below))
        if code != -signal.SIGKILL:
            assert code == 0
            return
        yield number


@contextmanager
def reading(fifo: Path) -> Iterator[list[bytes]]:
    """Makes a FIFO; after the block the list holds what was written to it, if anything was."""
    os.mkfifo(fifo)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()), daemon=True)
    reader.start()
    yield got
    reader.join(5)
