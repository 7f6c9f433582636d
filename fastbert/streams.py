"""Standard input, output and error that are usable even if they are closed or full, or their encoding lacks
characters."""

import io
import os
import sys

from fastbert.errors import printable, visible

_muted = False


def mute(muted: bool = True) -> None:
    """Drops the messages and progress of this process, one of several that do the same; its errors are still
    printed."""
    global _muted
    _muted = muted


def is_muted() -> bool:
    return _muted


def echo(text: str) -> None:
    """Prints a message of one or more lines to standard error; control characters in names and values are escaped."""
    if not _muted:
        print(visible(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Prints a warning of one line to standard error."""
    echo(f"warning: {printable(text)}")


def prepare_streams() -> None:
    """Replaces unusable standard streams; may be called again.

    - A closed stream is redirected to /dev/null. Otherwise the next opened file would get its number, and messages
      would be written into that file.
    - Characters that the encoding of standard output lacks are written as escapes, and so are file names that are not
      text.
    - Messages and progress that cannot be written to standard error (a full disk, a closed terminal) are dropped, so
      that they do not stop a training run.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (lives as long as the process)
    if sys.stdout is sys.__stdout__ and not isinstance(sys.stdout, _Stream):
        sys.stdout = sys.__stdout__ = _Stream(sys.stdout, io.BufferedWriter(_Recording(1, "w", closefd=False)))
    if sys.stderr is sys.__stderr__ and not isinstance(sys.stderr, _Stream):
        sys.stderr = sys.__stderr__ = _Stream(sys.stderr, _Dropping(2, "w", closefd=False), line_buffering=True)


def flush_standard_output() -> None:
    """Flushes standard output and raises the OSError of a failed write, even if it was caught, as in argparse."""
    sys.stdout.flush()
    if isinstance(sys.stdout, _Stream) and (error := sys.stdout.buffer.raw.failed):
        raise error


def standard_output_fails() -> bool:
    """Returns True if a write to standard output failed."""
    try:
        flush_standard_output()
    except OSError:
        return True
    return False


def give_up_standard_output() -> None:
    """Drops the remaining output, so that the interpreter does not try again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Stream(io.TextIOWrapper):
    """Replacement for the stream `before` (None if it was closed) that escapes characters its encoding lacks."""

    def __init__(self, before: io.TextIOWrapper | None, target: io.IOBase, line_buffering: bool = False) -> None:
        encoding = "utf-8"
        if before is not None:
            before.flush()
            encoding, line_buffering = before.encoding, line_buffering or before.line_buffering
        super().__init__(target, encoding, "backslashreplace", line_buffering=line_buffering)


class _Recording(io.FileIO):
    """Records the error of a failed write."""

    failed: OSError | None = None

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


class _Dropping(io.FileIO):
    """Drops output that cannot be written."""

    def write(self, data: bytes) -> int:
        size, done = len(data), 0
        try:
            while done < size:
                done += super().write(data[done:]) or size  # None: a non-blocking pipe is full
        except OSError:
            pass
        return size
