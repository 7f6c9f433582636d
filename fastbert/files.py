"""Files written whole or not at all: write beside, flush to the disk, rename. Every room writes through here."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastbert.errors import UserError


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turns what the operating system says about space and permission into a UserError that names `path`."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"no permission to write {path}; choose another folder or change its permissions") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full, writing {path}; free some space or choose another folder") from error
        if error.errno == errno.EROFS:
            raise UserError(f"{path} lies on a read-only file system; choose another folder") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write {path}: part of that path is a file; choose another folder") from error
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"cannot write {path}: a name in that path is too long; choose a shorter one") from error
        raise


@contextmanager
def folder_errors(path: Path | str) -> Iterator[None]:
    """`disk_errors` while a folder is made; where there can be none, as below /proc, that is said too."""
    with disk_errors(path):
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"no folder can be made at {path}; choose another place") from error


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, if they are not there.

    Raises:
        UserError: it cannot be made.
    """
    with folder_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renames within `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file that appears under `path` only when the block ends without an error."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    make_folder(path.parent)
    with disk_errors(path):
        try:
            with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """A folder that appears under `path` only when the block ends without an error; an older one is replaced."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        shutil.rmtree(beside, ignore_errors=True)
        make_folder(beside)
        try:
            yield beside
            for inside in beside.rglob("*"):
                if inside.is_dir():
                    sync_folder(inside)
                else:
                    with open(inside, "rb") as handle:
                        os.fsync(handle.fileno())
            sync_folder(beside)
            if path.exists():
                old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
                os.rename(path, old)
                os.rename(beside, path)
                shutil.rmtree(old)
            else:
                os.rename(beside, path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        sync_folder(path.parent)


LOCK = ".lock"


@contextmanager
def locked_folder(folder: Path | str) -> Iterator[None]:
    """Makes the folder and keeps other processes from training in it; if nothing was written, it is as it was.

    The lock is the process's, so it ends with it, however that ends.

    Raises:
        UserError: it cannot be made, or another process trains there.
    """
    folder = Path(folder)
    make_folder(folder)
    with disk_errors(folder):
        before = set(os.listdir(folder))
        lock = open(folder / LOCK, "w")  # noqa: SIM115 (closed below)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"another process is training in {folder}; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.close()
        if set(os.listdir(folder)) == before | {LOCK} and LOCK not in before:
            (folder / LOCK).unlink()
            if not before:
                folder.rmdir()


_SET_ASIDE = re.compile(r"\.(.+)\.\d+\.old\.tmp")


def remove_leftovers(folder: Path | str) -> None:
    """Removes what a killed process left half written in `folder` (names of `atomic_file` and `atomic_folder`).

    A folder that was set aside to be replaced, and whose successor never came, goes back to its place.
    """
    folder = Path(folder)
    for path in folder.glob(".*.tmp"):
        aside = _SET_ASIDE.fullmatch(path.name)
        if aside and not (folder / aside[1]).exists():
            path.rename(folder / aside[1])
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` as `json_text` has it."""
    with atomic_file(path, "w") as file:
        file.write(json_text(value, indent=2) + "\n")


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON in which null stands for what is not finite: JSON has no NaN and no infinity.

    Args:
        options: of `json.dumps`.
    """
    return json.dumps(finite_or_none(value), allow_nan=False, **options)


def finite_or_none(value: Any) -> Any:
    """`value`, of what JSON can hold, with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {finite_or_none(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return value


def read_json(path: Path | str, what: str) -> Any:
    """The JSON in `path`; `what` names it in errors.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except (ValueError, RecursionError) as error:  # not JSON or not UTF-8; nested too deep
        raise UserError(f"{what} {path} is damaged: {error}") from None


def seal_of(record: dict[str, Any]) -> str:
    """SHA-256 over a JSON object but for its key `seal`, which is where a file keeps the hash of its own content."""
    bare = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()
