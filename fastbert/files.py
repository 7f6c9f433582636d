"""Files and folders written whole or not at all: under a temporary name in the same folder, flushed to the disk, then
renamed. Everything that fastbert writes uses this module.

Two classes of outputs treat links differently:

- Files and folders inside a folder of fastbert (config.yaml, model/): `atomic_file` and `atomic_folder`. A link with
  that name may have been planted by another user, so it is replaced and never followed. A link instead of a folder that
  is written over time (checkpoints/, report/) is refused.
- Outputs given by --out: see `fastbert.outputs`, which follows links and writes into devices and mount points.

Temporary files are created with O_EXCL under new names, and the writing process holds a lock on them. So they do not
follow links either, and leftovers of a killed process can be distinguished from files of a running process: the next
write of the same name removes them.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastbert.errors import UserError
from fastbert.system_errors import out_of_memory, reason

LOCK = ".lock"
LOST_AND_FOUND = "lost+found"  # in the root folder of many file systems
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]+(\.old)?\.tmp")
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)  # file systems without flock


# --- errors


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Converts errors of the operating system about space and permissions to a UserError that names `path`."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"no permission to write {path}; choose another folder or change its permissions") from error
    except FileNotFoundError as error:
        if _is_gone(path):
            raise UserError(f"cannot write {path}: its folder was removed in the meantime; start again") from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write {path}: part of that path is a file; choose another folder") from error
        if error.errno == errno.EISDIR:
            raise UserError(f"cannot write {path}: it is a folder; choose another name or remove it") from error
        if error.errno == errno.EROFS:
            raise UserError(f"{path} is on a read-only file system; choose another folder") from error
        if error.errno == errno.ELOOP:
            raise UserError(f"cannot write {path}: a link in that path is not followed; remove it") from error
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"cannot write {path}: a name in that path is too long; choose a shorter one") from error
        if out_of_memory(error) or (found := reason(error)) is None:
            raise
        raise UserError(f"{found[0]} while writing {path}; {found[1]}") from error


def _is_gone(path: Path | str) -> bool:
    """Returns True if the folder of `path` no longer exists."""
    return not os.path.isdir(os.path.dirname(os.path.abspath(path)))


@contextmanager
def folder_errors(path: Path | str) -> Iterator[None]:
    """`disk_errors` for creating a folder; also reports locations where none can be created, such as /proc."""
    with disk_errors(path):
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"no folder can be created at {path}; choose another one") from error


# --- folders


def make_folder(path: Path) -> list[Path]:
    """Creates a folder and its parents if they do not exist. For a broken link, the target is created.

    Returns:
        The folders that were created, the outermost first.

    Raises:
        UserError: it cannot be created; created parents are removed again.
    """
    with folder_errors(path):
        real = Path(os.path.realpath(path))
        missing = [folder for folder in (real, *real.parents) if not os.path.lexists(folder)][::-1]
        try:
            real.mkdir(parents=True, exist_ok=True)
            os.stat(path)  # fails for "a/../b" if there is no a
        except OSError:
            remove_empty([folder for folder in missing if os.path.isdir(folder)])
            raise
    return missing


def make_inner_folder(path: Path) -> None:
    """Creates a folder inside a folder of fastbert if needed. Raises a UserError if it cannot be created or is a
    link."""
    refuse_link(path)
    make_folder(path)


def refuse_link(path: Path) -> None:
    """Raises a UserError if a folder inside a folder of fastbert is a link, which may lead to another user's files."""
    if os.path.islink(path):
        raise UserError(
            f"{path} is a link, which is not followed: replace it with its target, or give --out a folder on "
            "the other disk"
        )


def remove_empty(folders: list[Path]) -> None:
    """Removes those of several nested folders that are empty. The outermost comes first, as returned by
    `make_folder`."""
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                return
            if error.errno != errno.ENOENT:
                raise


def contents(folder: Path) -> set[str]:
    """Names in `folder`, except locks, leftovers of killed processes and lost+found."""
    return {name for name in os.listdir(folder) if name not in (LOCK, LOST_AND_FOUND) and not is_temporary(name)}


def is_temporary(name: str) -> bool:
    return _TEMPORARY.fullmatch(name) is not None


def sync_folder(folder: Path) -> None:
    """Flushes renames within `folder` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flushes everything in `folder` to the disk."""
    for inside in folder.rglob("*"):
        if inside.is_dir():
            sync_folder(inside)
        else:
            with open(inside, "rb") as handle:
                os.fsync(handle.fileno())
    sync_folder(folder)


def remove(path: Path) -> None:
    """Removes a file, a link (not its target), or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- files and folders that appear when they are complete


@contextmanager
def atomic_file(
    path: Path | str, mode: str = "wb", *, replace: Callable[[Path, Path], None] | None = None
) -> Iterator[IO[Any]]:
    """Yields a file that appears as `path` only when the block ends without an error. A link there is replaced.

    Args:
        replace: function (temporary file, path) that moves the complete file to `path`; by default a rename.

    Raises:
        UserError: there is no space or permission, or `path` is a folder, a device or similar.
    """
    path = Path(path)
    made = make_folder(path.parent)
    with disk_errors(path):
        refuse_special(path)
        remove_leftovers(path.parent, path.name)
        temporary, handle = _new_file(path)
        try:
            with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                (replace or os.replace)(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            remove_empty(made)
            raise
        sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields a folder that appears as `path` only when the block ends without an error. An older folder or a link is
    replaced."""
    path = Path(path)
    made = make_folder(path.parent)
    with disk_errors(path):
        remove_leftovers(path.parent, path.name)
        temporary, handle = new_folder(path)
        old = path.with_name(_temporary(path.name, ".old.tmp"))
        try:
            yield temporary
            sync_tree(temporary)
            if os.path.lexists(path):
                os.rename(path, old)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if os.path.lexists(old) and not os.path.lexists(path):
                os.rename(old, path)
            remove_empty(made)
            raise
        finally:
            os.close(handle)
        remove(old)
        sync_folder(path.parent)


def refuse_special(path: Path) -> None:
    """Raises a UserError if `path` exists and is neither a file nor a link: a rename would destroy a device."""
    if os.path.lexists(path):
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"cannot write {path}: it is a folder; choose another name or remove it")
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise UserError(f"cannot write {path}: it is neither a file nor a folder; choose another name or remove it")


def _temporary(name: str, ending: str = ".tmp") -> str:
    return f".{shortened(name)}.{secrets.token_hex(4)}{ending}"


def shortened(name: str) -> str:
    """`name`, shortened so that `_temporary` can extend it to at most 255 bytes."""
    return name.encode(errors="surrogateescape")[:230].decode(errors="ignore")


def _new_file(path: Path) -> tuple[Path, int]:
    """Creates a temporary file in the folder of `path` and locks it; returns its path and descriptor."""
    while True:
        temporary = path.with_name(_temporary(path.name))
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        if lock(handle) is not False and os.path.lexists(temporary):
            return temporary, handle
        os.close(handle)  # another process took it for a leftover and removed it just before it was locked


def new_folder(path: Path) -> tuple[Path, int]:
    """Creates a temporary folder next to `path` and locks it; returns its path and descriptor, which must be closed
    after the rename."""
    while True:
        temporary = path.with_name(_temporary(path.name))
        temporary.mkdir()
        handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if lock(handle) is not False and os.path.lexists(temporary):
            return temporary, handle
        os.close(handle)


def no_link(path: str, flags: int) -> int:
    """Opener for `open(..., opener=no_link)` that fails if `path` is a link, so that its target is not written."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


# --- locks and leftovers


def lock(handle: int, wait: bool = False) -> bool | None:
    """Locks an open file or folder. Returns False if another process has the lock, None if the file system has no
    locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def open_lock(path: Path) -> int:
    """Opens a lock file, or creates it, without truncating it or following a link; returns its descriptor.

    Raises:
        UserError: `path` is a link or not a file, or cannot be written.
        FileNotFoundError: its folder does not exist.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"the lock {path} is a link; remove it") from None
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise UserError(f"the lock {path} is not a file; remove it") from None
        if error.errno == errno.ENOENT:
            raise
        with disk_errors(path):
            raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"the lock {path} is not a file; remove it")
    return handle


def is_open_as(handle: int, path: Path) -> bool:
    """Returns True if `path` is still the file that was opened as `handle`."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def locked_folder(folder: Path | str) -> Iterator[None]:
    """Creates the folder and prevents other processes from training in it. If nothing was written, created folders are
    removed again.

    The lock is released when the process exits, for whatever reason.

    Raises:
        UserError: the folder cannot be created, or another process is training there.
    """
    folder = Path(folder)
    while True:
        made = make_folder(folder)
        with disk_errors(folder):
            before = set(os.listdir(folder))
            handle = open_lock(folder / LOCK)
        if lock(handle) is False:
            os.close(handle)
            raise UserError(f"another process is training in {folder}; wait for it, or choose another --out")
        if is_open_as(handle, folder / LOCK):
            break
        os.close(handle)  # removed by a process that wrote nothing, between the two calls
    try:
        yield
    finally:
        if set(os.listdir(folder)) == before | {LOCK} and LOCK not in before:
            (folder / LOCK).unlink()
            remove_empty(made)
        os.close(handle)


def remove_leftovers(folder: Path | str, name: str | None = None) -> None:
    """Removes partly written files of killed processes from `folder` (temporary names of `atomic_file`,
    `atomic_folder`). Files of running processes remain, and links are neither followed nor removed.

    A folder that was renamed to be replaced, but was not replaced, is renamed back.

    Args:
        name: remove only leftovers of this file or folder, for a `folder` that belongs to the user.
    """
    folder = Path(folder)
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.name.startswith(".") and entry.name.endswith(".tmp")]
    for entry in found:
        parts = _TEMPORARY.fullmatch(entry.name)
        if name is not None and (parts is None or parts[1] != shortened(name)):
            continue
        if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
            continue
        path = Path(entry.path)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):  # just renamed, or owned by another user
            continue
        try:
            free = lock(handle)
            # Without locks, a folder of fastbert has a single writer; other folders are not changed.
            if free is False or (free is None and name is not None) or not is_open_as(handle, path):
                continue
            if parts and parts[2] and not os.path.lexists(folder / parts[1]):
                path.rename(folder / parts[1])
            else:
                remove(path)
        except PermissionError:  # owned by another user, in a common folder for temporary files
            if name is None:
                raise
        finally:
            os.close(handle)
