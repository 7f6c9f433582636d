"""What the user names with --out: checked before work starts, and written such that it stays what it is.

A file (`output_file`):
- a link stays, and the file it leads to, existing or not, has the new content, whole or not at all;
- a FIFO, a character device (/dev/null) or an open descriptor (/dev/stdout, /dev/fd/N, `>(...)`) is written into;
- a file that is a mount point cannot be replaced, so it is overwritten once the content is complete;
- a folder, a block device or a socket is refused.

A folder (`output_folder`, and `prepare` in a way that survives kills):
- a link stays, and the folder it leads to is the output; it is made if it is not there;
- a folder that is not there is written next to its place and renamed;
- an empty folder, a mount point, the working directory, or a folder in one that cannot be written is filled from
  within: a rename would fail, or cost the folder its permissions. The file that makes it complete comes last.
"""

import errno
import fcntl
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastbert.errors import UserError
from fastbert.files import (
    atomic_file,
    atomic_folder,
    contents,
    disk_errors,
    folder_errors,
    new_folder,
    remove,
    remove_leftovers,
    sync_folder,
    sync_tree,
)

# --- files


def check_output_file(path: Path | str) -> None:
    """Raises a UserError, before work starts, if `output_file` cannot write `path`; writes nothing."""
    path = Path(path)
    with disk_errors(path):
        if _descriptor(path) is None and not _is_stream(path):
            target = _target(path)
            _check_room(target.parent, path, target.name)


@contextmanager
def output_file(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file for the user, to be written in this block (see the head of this module); a UserError if it cannot be."""
    path = Path(path)
    encoding = None if "b" in mode else "utf-8"
    with disk_errors(path):
        number = _descriptor(path)
        if number is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            with open(os.dup(number), mode, encoding=encoding) as file:
                yield file
        elif _is_stream(path):
            with open(os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC), mode, encoding=encoding) as file:
                yield file
        else:
            with atomic_file(_target(path), mode, replace=_replace) as file:
                yield file


def is_standard_output(path: Path | str) -> bool:
    """Whether what is written to `path` goes where standard output goes, so that nothing else should."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:  # no such file yet, or a closed standard output
        return False


def _is_stream(path: Path) -> bool:
    """Whether `path` is written into, for it holds nothing that could be replaced."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _descriptor(path: Path) -> int | None:
    """N if `path` means the open descriptor N of this process, such as /dev/stdout and /dev/fd/N; else None.

    Opened by its name it would be another file description, with an offset of its own: where standard output is a file,
    each would write over the other.
    """
    for _ in range(40):  # as many links as Linux follows
        folder = os.path.realpath(path.parent)
        if re.fullmatch("[0-9]+", path.name) and re.fullmatch(rf"/proc/{os.getpid()}(/task/\d+)?/fd", folder):
            return _writable(int(path.name), path)
        try:
            path = Path(folder, os.readlink(Path(folder, path.name)))
        except OSError:  # no link
            return None
    return None


def _writable(number: int, path: Path) -> int:
    """`number`, if that descriptor is open for writing."""
    try:
        read_only = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:
        raise UserError(f"{path}: this process has no open descriptor {number}; give --out a file") from None
    if read_only:
        raise UserError(f"{path}: descriptor {number} is open for reading only; give --out a file")
    return number


def _target(path: Path) -> Path:
    """The file that `path` is, or leads to."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder; give --out a file in it")
    if not stat.S_ISREG(mode):
        kind = "a block device" if stat.S_ISBLK(mode) else "a socket"
        raise UserError(f"{path} is {kind}; give --out a file")
    return Path(os.path.realpath(path))


def _replace(temporary: Path, path: Path) -> None:
    """Puts a complete file into place; where that is a mount point, by writing into it."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        with open(temporary, "rb") as source, open(path, "r+b") as file:
            file.truncate()
            shutil.copyfileobj(source, file, 2**20)
            file.flush()
            os.fsync(file.fileno())
        temporary.unlink()


# --- folders


def check_output_folder(path: Path | str) -> None:
    """Raises a UserError, before work starts, if no files can be written to the folder `path`, which need not be there;
    makes nothing."""
    with folder_errors(path):
        _check_room(resolved(path), path)


def resolved(path: Path | str) -> Path:
    """The folder that `path` is, or leads to, absolute. It need not be there."""
    return Path(os.path.realpath(path))


def _check_room(folder: Path, asked: Path | str, name: str = "") -> None:
    """Raises a UserError if a file `name` cannot be written to `folder`, which need not be there.

    Args:
        asked: names the output in errors.
    """
    there, names = folder, [name]
    while not os.path.lexists(there):
        names.append(there.name)
        there = there.parent
    if there.is_symlink():  # all others are resolved
        raise UserError(f"cannot write {asked}: a link in that path leads back to itself; remove it")
    if not there.is_dir():
        raise UserError(f"cannot write {asked}: part of that path is a file; choose another folder")
    if max(len(os.fsencode(name)) for name in names) > os.pathconf(there, "PC_NAME_MAX"):
        raise UserError(f"cannot write {asked}: a name in that path is too long; choose a shorter one")
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        raise UserError(f"{asked} lies on a read-only file system; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write {asked}; choose another folder or change its permissions")
    if not os.statvfs(there).f_blocks:  # the kernel's own, such as /proc: what it refuses shows only when it is tried
        with folder_errors(asked):
            temporary, handle = new_folder(there / "fastbert")
        os.close(handle)
        temporary.rmdir()


def is_filled_within(path: Path) -> bool:
    """Whether the folder `path`, resolved, must stay the folder it is: see the head of this module."""
    if not path.is_dir():
        return False
    return (
        not contents(path)
        or is_mount(path)
        or os.path.samefile(path, os.curdir)
        or not os.access(path.parent, os.W_OK | os.X_OK)
    )


def is_mount(path: Path) -> bool:
    """Whether a folder is a mount point, bind mounts of the same file system included."""
    if os.path.ismount(path):
        return True
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            points = [line.split(" ")[4] for line in file]
    except FileNotFoundError:  # not Linux
        return False
    return str(path) in (re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), point) for point in points)


@contextmanager
def output_folder(path: Path | str, first: str, last: str) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends without an error: whole or not at all, except that a
    kill while a folder is filled from within may leave it without the file `last`.

    Args:
        first: the file that shows whose folder it is, if the call is killed while it is filled: it is put there before
            the others, and that of an older output is removed after the others.
        last: the file without which nothing opens the folder.

    Raises:
        UserError: it cannot be written.
    """
    path = resolved(path)
    if not is_filled_within(path):
        with atomic_folder(path) as folder:
            yield folder
        return
    with disk_errors(path):
        remove_leftovers(path, path.name)
        inside, handle = new_folder(path / path.name)
        moving = False
        try:
            yield inside
            sync_tree(inside)
            moving = True
            for name in ordered(contents(path), last, first):
                remove(path / name)
            move_contents(inside, path, ordered(os.listdir(inside), first, last))
        except BaseException:
            if not moving:
                shutil.rmtree(inside, ignore_errors=True)
            raise
        finally:
            os.close(handle)


def ordered(names: Sequence[str] | set[str], first: str, last: str) -> list[str]:
    """`names` by the alphabet, but for the two at the ends."""
    return sorted(names, key=lambda name: (name == last, name != first, name))


def move_contents(source: Path, target: Path, names: Sequence[str]) -> None:
    """Moves the files and folders `names` of `source`, one after the other, and removes `source`. Both are folders of
    one file system."""
    for name in names:
        os.rename(source / name, target / name)
        sync_folder(target)  # so that no order but this one reaches the disk
    shutil.rmtree(source)
    sync_folder(target)
