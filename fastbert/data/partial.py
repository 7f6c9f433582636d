"""The folder `prepare` works in: beside its result, for one process at a time, and still of use after a kill."""

import fcntl
import json
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.errors import UserError
from fastbert.files import atomic_file, disk_errors, make_folder, read_json, remove_leftovers, sync_folder, write_json

LOCK, MADE_OF, TOKENIZER, STATE = ".lock", ".made_of.json", ".tokenizer.json", ".state.npz"
# What numpy and zipfile raise over a damaged archive, found by flipping each of its bits.
_UNZIPPING = (
    ValueError,
    LookupError,
    EOFError,
    OSError,
    RuntimeError,
    OverflowError,
    SyntaxError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


class Partial:
    """A result in the making: `folder`, and the state of the work at its last `save`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Keeps JSON and arrays, whole or not at all, in place of what was kept before."""
        with atomic_file(self.folder / STATE) as file:
            np.savez(file, record=np.frombuffer(json.dumps(record, allow_nan=False).encode(), np.uint8), **arrays)

    def load(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """What was saved last; None if nothing was."""
        if not (self.folder / STATE).is_file():
            return None
        try:
            with np.load(self.folder / STATE, allow_pickle=False) as data:
                arrays = dict(data)
                return json.loads(arrays.pop("record").tobytes()), arrays
        except _UNZIPPING as error:
            raise UserError(f"{self.folder / STATE} is damaged ({error}); remove {self.folder} to begin anew") from None

    def forget(self) -> None:
        """Drops what was saved."""
        (self.folder / STATE).unlink(missing_ok=True)


@contextmanager
def partial_folder(out: Path, made_of: dict[str, Any]) -> Iterator[Partial | None]:
    """A folder to fill, which becomes `out` when the block ends without an error; None if `out` came meanwhile.

    If the process is killed or interrupted, or fails after a `save`, the folder stays, and the next call with the same
    `made_of` (JSON) gets it as it is; with another it starts anew. Where another process fills it, this one waits.
    """
    folder = out.with_name(f".{out.name}.partial")
    with disk_errors(out):
        lock = _lock(folder, out)
        if lock is None:
            yield None
            return
        with lock:
            _clean(folder)
            if not (folder / MADE_OF).is_file() or read_json(folder / MADE_OF, "leftover") != made_of:
                _empty(folder)
                write_json(folder / MADE_OF, made_of)
            elif (folder / "tokenizer").is_dir():
                print(f"going on with what an interrupted call left in {folder}", file=sys.stderr)
            try:
                yield Partial(folder)
                _finish(folder, out)
            except BaseException as error:
                interrupted = not isinstance(error, Exception) and (folder / "tokenizer").is_dir()
                if interrupted or (folder / STATE).is_file():
                    print(f"what was done stays in {folder}; the same command goes on from there", file=sys.stderr)
                else:
                    shutil.rmtree(folder)
                raise


def _lock(folder: Path, out: Path) -> Any:
    """The lock of `folder`, an open file; None if another process held it and has made `out`."""
    while True:
        make_folder(folder)
        try:
            lock = open(folder / LOCK, "w")  # noqa: SIM115 (the caller closes it)
        except FileNotFoundError:  # the folder was renamed just now
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process prepares {out}; waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        same = (folder / LOCK).exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK))
        if (out / "dataset.json").is_file():  # it was not there when this process began
            if same:
                shutil.rmtree(folder)
            lock.close()
            return None
        if same:
            return lock
        lock.close()  # of a folder that was removed while this process waited


def _clean(folder: Path) -> None:
    """Removes files and folders that a kill left half written."""
    remove_leftovers(folder)
    if (folder / "tokenizer").is_dir():
        remove_leftovers(folder / "tokenizer")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _finish(folder: Path, out: Path) -> None:
    """Makes `folder` durable and renames it."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
    if out.is_dir():  # an empty one: others are refused before any work
        out.rmdir()
    os.rename(folder, out)
    for name in (STATE, TOKENIZER, MADE_OF, LOCK):
        (out / name).unlink(missing_ok=True)
    sync_folder(out)
    sync_folder(out.parent)
