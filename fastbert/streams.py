"""Standard input, output and error, whatever the shell made of them: closed, full, or of an encoding without our
characters."""

import io
import os
import sys

from fastbert.errors import printable, visible


def echo(text: str) -> None:
    """Prints a message of one or more lines to standard error; control characters in names and values are escaped."""
    print(visible(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Prints a warning of one line to standard error."""
    echo(f"warning: {printable(text)}")


def prepare_streams() -> None:
    """Makes standard streams that can be used; may be called again.

    - A closed one leads to /dev/null. Left closed, its number would go to the next file that is opened, and whatever
      prints to that number would write into that file.
    - Characters that the encoding of standard output lacks are written as escapes; so are file names that are no text.
    - Messages and progress that standard error does not take (a full disk, a terminal that is gone) are dropped: no
      training ends because of them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (lives as long as the process)
    if sys.stdout is sys.__stdout__ and not isinstance(sys.stdout, _Stream):
        sys.stdout = sys.__stdout__ = _Stream(sys.stdout, io.BufferedWriter(_Noting(1, "w", closefd=False)))
    if sys.stderr is sys.__stderr__ and not isinstance(sys.stderr, _Stream):
        sys.stderr = sys.__stderr__ = _Stream(sys.stderr, _Dropping(2, "w", closefd=False), line_buffering=True)


def flush_standard_output() -> None:
    """Raises the OSError of what could not be written there, also if that was caught, as argparse does."""
    sys.stdout.flush()
    if isinstance(sys.stdout, _Stream) and (error := sys.stdout.buffer.raw.failed):
        raise error


def standard_output_fails() -> bool:
    """Whether something could not be written to standard output."""
    try:
        flush_standard_output()
    except OSError:
        return True
    return False


def give_up_standard_output() -> None:
    """Drops what is left to be written there, so that the interpreter's end does not try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Stream(io.TextIOWrapper):
    """Takes the place of `before`, which is None if it was closed; characters that its encoding lacks are escaped."""

    def __init__(self, before: io.TextIOWrapper | None, target: io.IOBase, line_buffering: bool = False) -> None:
        encoding = "utf-8"
        if before is not None:
            before.flush()
            encoding, line_buffering = before.encoding, line_buffering or before.line_buffering
        super().__init__(target, encoding, "backslashreplace", line_buffering=line_buffering)


class _Noting(io.FileIO):
    """Notes that something could not be written."""

    failed: OSError | None = None

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


class _Dropping(io.FileIO):
    """Drops what cannot be written."""

    def write(self, data: bytes) -> int:
        size, done = len(data), 0
        try:
            while done < size:
                done += super().write(data[done:]) or size  # None: a pipe that is full and does not wait
        except OSError:
            pass
        return size
