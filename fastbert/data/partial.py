"""Working folder of `prepare`: one process at a time uses it, and the next call continues after a process was killed.

It is next to the result and is renamed at the end. If the folder of the result already exists and has to remain (see
`fastbert.outputs`), the working folder is inside it, and its contents are moved out, dataset.json last.
"""

import json
import math
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.errors import UserError
from fastbert.files import (
    LOCK,
    atomic_file,
    contents,
    disk_errors,
    is_open_as,
    lock,
    make_folder,
    open_lock,
    remove,
    remove_empty,
    remove_leftovers,
    shortened,
    sync_folder,
    sync_tree,
)
from fastbert.inputs import UnreadableError, open_input, raise_refusal
from fastbert.outputs import move_contents, ordered, resolved
from fastbert.progress import progress
from fastbert.records import parse_json, read_json, write_json
from fastbert.streams import echo

MADE_OF, TOKENIZER, STATE = ".made_of.json", ".tokenizer.json", ".state.npz"
MOVED = ".moved.json"  # names of all files of the result; exists as soon as the result is complete
INNER = (STATE, TOKENIZER, MADE_OF, MOVED, LOCK)  # names that are not a part of the result
WITHIN = ".partial"
DATASET = "dataset.json"
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
# Errors of numpy and zipfile for a damaged archive, found by flipping each of its bits.
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


class DamagedWorkError(UserError):
    """Damaged files of an interrupted call."""


@contextmanager
def leftover_errors(folder: Path) -> Iterator[None]:
    """Context manager for reading an interrupted call's files in `folder`: errors also explain how to continue.

    Raises:
        DamagedWorkError: the block raised a UserError.
    """
    try:
        yield
    except UnreadableError:
        raise
    except UserError as error:
        raise DamagedWorkError(f"{error}; remove {folder} to start from the beginning") from None


class Partial:
    """An unfinished result: `folder`, and the state of the work at the last `save`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def complete(self) -> bool:
        """True if the result only has to be moved to its final folder, for example after a kill during the move."""
        return (self.folder / MOVED).is_file()

    def save(self, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Replaces the saved state by JSON and arrays, whole or not at all."""
        with atomic_file(self.folder / STATE) as file:
            np.savez(file, record=np.frombuffer(json.dumps(record, allow_nan=False).encode(), np.uint8), **arrays)

    def load(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """The last saved state; None if there is none. Raises a UserError if it is damaged."""
        if not (self.folder / STATE).is_file():
            return None
        try:
            arrays = _read_arrays(self.folder / STATE)
            return parse_json(arrays.pop("record").tobytes(), f"the record in {self.folder / STATE}", dict), arrays
        except _UNZIPPING as error:
            raise_refusal(error, self.folder / STATE)
            raise UserError(f"{self.folder / STATE} is damaged ({error})") from None


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads an untrusted file that `np.savez` wrote, using no more memory than the file has bytes."""
    arrays = {}
    with open_input(path) as file, zipfile.ZipFile(file) as archive:
        size = os.fstat(file.fileno()).st_size
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise ValueError("its entries are longer than the file")
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            with archive.open(entry) as member:
                np.lib.format.read_magic(member)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                if dtype.hasobject or fortran or math.prod(shape) * dtype.itemsize > entry.file_size:
                    raise ValueError(f"{entry.filename} does not have the length in its header")
                content = bytearray(math.prod(shape) * dtype.itemsize)
                filled = 0
                while part := member.read(2**20):
                    content[filled : filled + len(part)] = part
                    filled += len(part)
            if filled != len(content) or len(content) != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{entry.filename} does not have the length in its header")
            arrays[entry.filename.removesuffix(".npy")] = np.frombuffer(content, dtype).reshape(shape)
    return arrays


def is_free(out: Path) -> bool:
    """Returns True if a result may be written to `out`: it does not exist or is empty, or a call was killed while it
    moved a result there."""
    if not out.exists():
        return True
    return out.is_dir() and (not contents(out) - {WITHIN} or (out / WITHIN / MOVED).is_file())


@contextmanager
def partial_folder(out: Path, made_of: dict[str, Any]) -> Iterator[Partial | None]:
    """Yields a folder to fill, which becomes `out` when the block ends without an error; None if another process
    finished `out` in the meantime.

    If the process is killed or interrupted, or fails after a `save`, the folder remains, and the next call with the
    same `made_of` (JSON) resumes the work; with another `made_of` it starts from the beginning. While another process
    uses the folder, this one waits.
    """
    out = resolved(out)
    folder = out / WITHIN if out.is_dir() else out.with_name(f".{shortened(out.name)}.partial")
    with disk_errors(out):
        handle, made = _lock(folder, out)
        if handle is None:
            yield None
            return
        try:
            if _is_planted(folder):
                _empty(folder, out)
            _clean(folder)
            with leftover_errors(folder):
                left = (folder / MADE_OF).is_file()
                same = left and read_json(folder / MADE_OF, "leftover") == made_of
            if not same:
                if left:
                    echo(
                        f"starting from the beginning: the unfinished work in {folder} is from another source, other "
                        "options or another version",
                    )
                _empty(folder, out)
                write_json(folder / MADE_OF, made_of)
            elif (folder / "tokenizer").is_dir():
                echo(f"continuing the unfinished work in {folder}")
            partial = Partial(folder)
            try:
                yield partial
                _finish(folder, out)
            except DamagedWorkError:  # the same command would fail again
                raise
            except BaseException as error:
                interrupted = not isinstance(error, Exception) and (folder / "tokenizer").is_dir()
                if interrupted or partial.complete or (folder / STATE).is_file():
                    echo(f"the unfinished work remains in {folder}; the same command continues it")
                else:
                    shutil.rmtree(folder)
                    remove_empty(made)
                raise
        finally:
            os.close(handle)


def remove_traces(out: Path) -> None:
    """Removes working files from a finished folder, which remain if a call was killed after the last move."""
    if not os.access(out, os.W_OK | os.X_OK):
        return
    folder = out / WITHIN
    if folder.is_dir() and not folder.is_symlink():
        handle = open_lock(folder / LOCK)
        try:
            if lock(handle) is False:  # that call has not ended yet
                return
        finally:
            os.close(handle)
        shutil.rmtree(folder)
    for name in INNER:
        (out / name).unlink(missing_ok=True)


def _lock(folder: Path, out: Path) -> tuple[int | None, list[Path]]:
    """Locks `folder`: returns an open descriptor, or None if another process had the lock and finished `out`; and the
    folders that were created.

    Raises:
        UserError: `folder` is a link, which may lead to another user's files.
    """
    made: list[Path] = []
    while True:
        if folder.is_symlink():
            raise UserError(f"{folder}, the folder for unfinished work, is a link; remove it or choose another --out")
        made += make_folder(folder)
        try:
            handle = open_lock(folder / LOCK)
        except FileNotFoundError:  # the folder was renamed just now
            continue
        if lock(handle) is False:
            echo(f"another process is preparing {out}; waiting for it")
            lock(handle, wait=True)
        same = is_open_as(handle, folder / LOCK)
        if (out / DATASET).is_file():  # it did not exist when this process started
            if same:
                shutil.rmtree(folder)
            os.close(handle)
            return None, made
        if same:
            return handle, made
        os.close(handle)  # the folder was removed while this process waited


def _is_planted(folder: Path) -> bool:
    """Returns True if `folder` or its tokenizer contains links, hard links to other files or FIFOs, which `prepare`
    never creates. Writing to them would change a file elsewhere."""
    for path in folder.iterdir():
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            if path.name == "tokenizer" and _is_planted(path):
                return True
        elif not stat.S_ISREG(found.st_mode) or (found.st_nlink > 1 and path.name != LOCK):
            return True
    return False


def _clean(folder: Path) -> None:
    """Removes files and folders that were partly written when a call was killed."""
    remove_leftovers(folder)
    if (folder / "tokenizer").is_dir():
        remove_leftovers(folder / "tokenizer")


def _empty(folder: Path, out: Path) -> None:
    """Removes another call's files in `folder`, and the files that it had moved to `out`."""
    if (folder / MOVED).is_file():
        for name in _moved(folder):
            remove(out / name)
    for path in folder.iterdir():
        if path.name != LOCK:
            remove(path)


def _moved(folder: Path) -> list[str]:
    """Names of all files of the result in `folder`. They are renamed and removed, so none may lead to another folder.
    Raises a UserError if `_finish` did not write them."""
    names = read_json(folder / MOVED, "leftover")
    plain = isinstance(names, list) and all(isinstance(name, str) and _PLAIN_NAME.fullmatch(name) for name in names)
    if not plain:
        raise UserError(
            f"{folder / MOVED} is damaged: it is not a list of names; remove {folder} to start from the beginning"
        )
    return names


def _finish(folder: Path, out: Path) -> None:
    """Flushes `folder` to the disk and moves it to `out`."""
    if not (folder / MOVED).is_file():
        with progress("flushing the files to the disk"):
            sync_tree(folder)
        write_json(folder / MOVED, sorted(name for name in contents(folder) if _PLAIN_NAME.fullmatch(name)))
    for path in (folder / STATE, *folder.glob(".*.npy")):  # the counts of `fastbert.data.tally` have hidden names
        path.unlink(missing_ok=True)
    names = _moved(folder)
    if out.is_dir():
        names = ordered([name for name in names if os.path.lexists(folder / name)], first="", last=DATASET)
        move_contents(folder, out, names)
        return
    os.rename(folder, out)
    for name in INNER:
        (out / name).unlink(missing_ok=True)
    sync_folder(out)
    sync_folder(out.parent)
