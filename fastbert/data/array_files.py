"""Files of numbers in a prepared folder: short reads at any position, and maps for reading in order.

A corpus of 10^10 tokens has hundreds of shards, and a step reads rows from most of them. A file is therefore opened
when it is first read, only a part of the descriptors that a process may have stays open, and a row that is not in
memory costs the pages that it is on, without the kernel's read-ahead. Such a read releases Python's lock, unlike an
access to a memory map, so that other threads continue while the disk is read.
"""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastbert.data.integrity import HEADER_BYTES, npy_header
from fastbert.errors import UserError
from fastbert.inputs import UnreadableError, input_errors, open_input

NUMBERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8")
AGAIN = "prepare it again (fastbert prepare) after removing the folder"
FRACTION_OPEN = 4  # the open files of all datasets are at most this part of the limit (ulimit -n): a fourth
FEWEST_OPEN, MOST_OPEN = 8, 1024
Opened = TypeVar("Opened")


class _Descriptor:
    """An open file, closed as soon as nothing refers to it."""

    def __init__(self, path: Path) -> None:
        self.number, self._close = -1, os.close  # when Python ends, `os` may be gone before the last file
        with open_input(path) as file, input_errors(path):
            self.number = os.dup(file.fileno())
            os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.number >= 0:
            self._close(self.number)


class OpenFiles:
    """Descriptors of the files that were read last, for all threads."""

    def __init__(self) -> None:
        self._recent: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.RLock()  # a thread that holds it may delete an ArrayFile in a garbage collection

    def of(self, file: "ArrayFile") -> _Descriptor:
        """The descriptor of `file`, which stays open at least as long as the caller refers to it."""
        with self._lock:
            if (found := self._recent.get(id(file))) is not None:
                self._recent.move_to_end(id(file))
                return found
        opened = self.with_room(lambda: _Descriptor(file.path))
        with self._lock:
            self._recent[id(file)] = opened
            self._recent.move_to_end(id(file))
            while len(self._recent) > most_open():
                self._recent.popitem(last=False)
        return opened

    def with_room(self, opened: Callable[[], Opened]) -> Opened:
        """The result of a function that opens a file. If that fails, all files here are closed, and it is called again:
        other parts of the process may have the rest of the descriptors."""
        try:
            return opened()
        except UnreadableError:
            with self._lock:
                if not self._recent:
                    raise
                self._recent.clear()
            return opened()

    def forget(self, file: "ArrayFile") -> None:
        """Closes `file`."""
        with self._lock:
            self._recent.pop(id(file), None)

    def __len__(self) -> int:
        """Number of open files."""
        return len(self._recent)


OPEN = OpenFiles()


def most_open() -> int:
    """Largest number of files that stay open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN if limit < 0 else min(max(limit // FRACTION_OPEN, FEWEST_OPEN), MOST_OPEN)


class ArrayFile:
    """The one-dimensional array in a .npy file. The header is that of `dtype` and the file's size if the file was
    verified."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        """Raises a UserError if the file does not exist."""
        self.path, self.dtype, self._open = path, dtype, OPEN
        with input_errors(path):
            self._length = max(0, path.stat().st_size - HEADER_BYTES) // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __del__(self) -> None:
        self._open.forget(self)

    def read(self, first: int, last: int) -> np.ndarray:
        """Numbers first ... last - 1, which must exist; read-only, in memory of their own.

        Raises:
            UserError: the file cannot be read, or was cut off meanwhile.
        """
        start, left = HEADER_BYTES + first * self.dtype.itemsize, (last - first) * self.dtype.itemsize
        descriptor = self._open.of(self)
        try:
            data = os.pread(descriptor.number, left, start)
            while len(data) < left:  # the system reads at most 2 GiB at a time
                if not (more := os.pread(descriptor.number, left - len(data), start + len(data))):
                    raise UserError(f"{self.path} was cut off while it was in use; {AGAIN}")
                data += more
        except OSError as error:
            with input_errors(self.path):
                raise error
        return np.frombuffer(data, self.dtype)

    def map(self) -> np.ndarray:
        """The array as a memory map, for reading in order. Its descriptor is closed with the last view of it.

        Raises:
            UserError: the header does not match.
        """
        return self._open.with_room(lambda: map_array(self.path, self.dtype))


def check_header(path: Path, dtype: np.dtype) -> int:
    """Number of entries of the one-dimensional array in a .npy file.

    Raises:
        UserError: the header does not match numbers of type `dtype` that fill the file.
    """
    with open_input(path) as file, input_errors(path):
        length = max(0, os.fstat(file.fileno()).st_size - HEADER_BYTES) // dtype.itemsize
        header = file.read(HEADER_BYTES)
    if header == npy_header(dtype, length):
        return length
    for other in map(np.dtype, NUMBERS):
        if header == npy_header(other, length * dtype.itemsize // other.itemsize):
            raise UserError(f"{path} contains {other}, not {dtype}; {AGAIN}")
    raise UserError(f"{path} is a damaged .npy file: its header is not one of {length} {dtype}; {AGAIN}")


def map_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """Maps the one-dimensional array in a .npy file into memory, read-only.

    Raises:
        UserError: as in `check_header`.
    """
    length = check_header(path, dtype)
    # A plain array, because slicing a numpy.memmap is slower.
    with input_errors(path):
        return np.memmap(path, dtype, "r", HEADER_BYTES, (length,)).view(np.ndarray) if length else np.zeros(0, dtype)
