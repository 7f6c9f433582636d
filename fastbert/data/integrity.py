"""Hashes of a prepared folder's files, computed while they are written and compared when the folder is opened.

Every file is hashed once per machine. The user's cache directory records its size, modification time and inode, so
opening a folder again costs a `stat` of each file; a file that was touched is hashed again. Only a forced verification
detects content that has changed although all three are the same, for example by a disk failure.
"""

import functools
import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.errors import UserError
from fastbert.files import atomic_file
from fastbert.inputs import input_errors, open_input
from fastbert.progress import progress
from fastbert.records import json_text, read_json
from fastbert.streams import echo

HEADER_BYTES = 128  # header size of a one-dimensional .npy file of any length
CHUNK = 2**20
THREADS = 4  # one thread hashes 2 GB/s if the processor has instructions for SHA-256, otherwise a fifth of that

FileRecord = dict[str, Any]
"""`bytes` and `sha256` of a file, as in dataset.json. A .npy file is hashed in the order in which it is written: first
the content, then the header, which contains the length and is known last."""


def is_record(value: Any) -> bool:
    """Returns True if `value`, from a JSON file, is a FileRecord."""
    return isinstance(value, dict) and {"bytes": int, "sha256": str} == {key: type(one) for key, one in value.items()}


def npy_header(dtype: np.dtype, length: int) -> bytes:
    """Header of HEADER_BYTES bytes that numpy writes for a file of `length` numbers."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (length,)})
    assert len(header.getvalue()) == HEADER_BYTES
    return header.getvalue()


def save_array(path: Path, array: np.ndarray) -> FileRecord:
    """Writes a one-dimensional array as numpy.save does; returns the record of the file."""
    data = np.ascontiguousarray(array)
    header = npy_header(data.dtype, len(data))
    with open(path, "wb") as file:
        file.write(header)
        file.write(data.data)
    sha = hashlib.sha256(data)
    sha.update(header)
    return {"bytes": HEADER_BYTES + data.nbytes, "sha256": sha.hexdigest()}


def sync_file(path: Path) -> None:
    """Flushes a file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class ArrayWriter:
    """Writes a one-dimensional .npy file bit by bit, with the same bytes and record as `save_array`."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.length, self.dtype = path, 0, np.dtype(dtype)
        self._sha = hashlib.sha256()
        self._file = path.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def append(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array, self.dtype)
        self._file.write(data.data)
        self._sha.update(data)
        self.length += len(data)

    def close(self) -> FileRecord:
        header = npy_header(self.dtype, self.length)
        self._file.seek(0)
        self._file.write(header)
        self._file.close()
        self._sha.update(header)
        return {"bytes": HEADER_BYTES + self.length * self.dtype.itemsize, "sha256": self._sha.hexdigest()}


def save_json(path: Path, value: Any) -> FileRecord:
    """Writes JSON, whole or not at all; returns the record of the file."""
    content = (json_text(value, indent=2) + "\n").encode()
    with atomic_file(path) as file:
        file.write(content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def file_record(path: Path) -> FileRecord:
    """Record of a file on the disk. Raises a UserError if it cannot be read."""
    return {"bytes": path.stat().st_size, "sha256": hash_of(path).hexdigest()}


def hash_of(path: Path, report: Callable[[int], None] = lambda count: None, stop: int | None = None) -> Any:
    """SHA-256 over a file, in the order of FileRecord.

    Args:
        report: called with the number of bytes hashed since the last call.
        stop: hash an unfinished .npy file up to this byte, without its header.

    Raises:
        UserError: it cannot be read.
    """
    sha, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    first = HEADER_BYTES if path.suffix == ".npy" else 0
    with open_input(path) as file, input_errors(path):
        position = file.seek(first)
        while count := file.readinto(buffer if stop is None else buffer[: max(0, stop - position)]):
            sha.update(buffer[:count])
            position += count
            report(count)
        if stop is None:
            file.seek(0)
            sha.update(header := file.read(first))
            report(len(header))
    return sha


def compare(folder: Path, files: Mapping[str, FileRecord], why: str) -> None:
    """Hashes files of `folder` and compares them with their records.

    Args:
        files: name -> record.
        why: end of the error message: what a difference means and how to fix it.

    Raises:
        UserError: files differ or cannot be read; the message names them.
    """
    total, done, lock = sum(record["bytes"] for record in files.values()), 0, threading.Lock()
    with (
        progress(f"verifying {folder}", total) as work,
        ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads,
    ):

        def advance(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                work.update(done)

        found = threads.map(lambda name: hash_of(folder / name, advance).hexdigest(), files)
        damaged = [name for name, sha in zip(files, found, strict=True) if sha != files[name]["sha256"]]
    if damaged:
        others = f" (and {len(damaged) - 1} more, such as {damaged[1]})" if damaged[1:] else ""
        raise UserError(f"{folder / damaged[0]} is damaged{others}: {why}")


# --- files that were verified on this machine


def unverified(folder: Path, files: Mapping[str, FileRecord], always: bool) -> tuple[list[str], dict[str, Any]]:
    """Finds the files that were not verified in their present state.

    Returns:
        Their names, or those of all files with `always`; and the marks of all files for `remember`.
    """
    known = {} if always else _remembered(folder)
    marks = {}
    for name, record in files.items():
        with input_errors(folder / name):
            found = (folder / name).stat()
        marks[name] = [found.st_size, found.st_mtime_ns, found.st_ino, record["sha256"]]
    return [name for name in files if known.get(name) != marks[name]], marks


def remember(folder: Path, marks: dict[str, Any]) -> None:
    """Records that files with these `marks` were verified. If this cannot be recorded, it is reported once, and the
    files are verified every time."""
    try:
        path = record_file(folder)
        with atomic_file(path, "w") as file:
            file.write(json_text({"folder": str(folder.resolve()), "files": marks}))
    except (UserError, OSError, RuntimeError) as error:
        _report_once(f"data is verified at every start, because verifications cannot be recorded: {error}")


def record_file(folder: Path) -> Path:
    """The file that records the verified files of `folder`.

    Raises:
        RuntimeError: the user has no home directory.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return Path(root) / "fastbert" / "verified" / f"{name}.json"


def _remembered(folder: Path) -> dict[str, Any]:
    """Marks of the last verification. If the record is missing, damaged or for another folder, the files are simply
    verified again."""
    try:
        record = read_json(record_file(folder), "record", {"folder": str, "files": dict})
    except (UserError, OSError, RuntimeError):
        return {}
    return record["files"] if record["folder"] == str(folder.resolve()) else {}


@functools.cache
def _report_once(text: str) -> None:
    echo(text)


def ascending_within(parts: Iterable[np.ndarray], stop: int) -> bool:
    """Returns True if the numbers, given in parts, ascend strictly within 0 ... stop - 1."""
    last = -1
    for part in parts:
        if len(part):
            if part[0] <= last or part[-1] >= stop or not (part[1:] > part[:-1]).all():
                return False
            last = part[-1]
    return True
