"""Outputs given by --out: checked before work starts, and written without changing their type.

A file (`output_file`):
- a link remains, and its target, existing or not, gets the new content, whole or not at all;
- a FIFO, a character device (/dev/null) or an open descriptor (/dev/stdout, /dev/fd/N, `>(...)`) is written into,
  standard output through its stream, so that `| head` ends the command without an error;
- a file that is a mount point cannot be replaced, so it is overwritten when the content is complete;
- a folder, a block device or a socket is refused.

A folder (`output_folder`, and `prepare` in a way that survives kills):
- a link remains, and its target is the output folder, created if needed;
- a folder that does not exist is written under a temporary name next to it and renamed;
- an empty folder, a mount point, the working directory, or a folder whose parent cannot be written is filled in place:
  a rename would fail, or change the folder's permissions. The file that makes it complete is moved last.
"""

import errno
import fcntl
import io
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastbert.errors import UserError, brief
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
from fastbert.records import read_json

JOB = "job"
"""Key of manifest.json with the name of the command that wrote the folder."""

# --- files


def check_output_file(path: Path | str) -> None:
    """Raises a UserError, before work starts, if `output_file` cannot write `path`; writes nothing."""
    path = Path(path)
    with disk_errors(path):
        if _descriptor(path) is None and not _is_stream(path):
            target = _target(path)
            _check_room(target.parent, path, target.name)


def refuse_input(out: Path | str, inputs: Iterable[Path | str]) -> None:
    """Raises a UserError if the file `out` is one of `inputs`, which it would replace."""
    if Path(out).is_file() and any(os.path.exists(one) and os.path.samefile(out, one) for one in inputs):
        raise UserError(f"--out {out} is an input of this command, which it would replace; choose another file")


@contextmanager
def output_file(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Yields a file for writing the user's output (see the module's docstring). Raises a UserError if it cannot be
    written."""
    path = Path(path)
    encoding = None if "b" in mode else "utf-8"
    number = _descriptor(path)
    if number == 1:
        with standard_output(mode) as file:
            yield file
        return
    with disk_errors(path):
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


@contextmanager
def standard_output(mode: str = "wb") -> Iterator[IO[Any]]:
    """Yields standard output, to write bytes or, with `mode` "w", UTF-8 text to, whatever its encoding is."""
    sys.stdout.flush()
    if "b" in mode:
        yield sys.stdout.buffer
        return
    file = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")
    try:
        yield file
    finally:
        file.detach()


def is_standard_output(path: Path | str) -> bool:
    """Returns True if `path` is the same file as standard output, so that nothing else should be printed there."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:  # no such file yet, or a closed standard output
        return False


def _is_stream(path: Path) -> bool:
    """Returns True if `path` is a FIFO or a character device, whose content cannot be replaced."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _descriptor(path: Path) -> int | None:
    """N if `path` is the open descriptor N of this process, such as /dev/stdout and /dev/fd/N; otherwise None.

    Opening it by its name would create another file description with a separate offset: if standard output is a file,
    the two would overwrite each other.
    """
    for _ in range(40):  # the number of links that Linux follows
        folder = os.path.realpath(path.parent)
        if re.fullmatch("[0-9]+", path.name) and re.fullmatch(rf"/proc/{os.getpid()}(/task/\d+)?/fd", folder):
            return _writable(int(path.name), path)
        try:
            path = Path(folder, os.readlink(Path(folder, path.name)))
        except OSError:  # not a link
            return None
    return None


def _writable(number: int, path: Path) -> int:
    """Returns `number` if that descriptor is open for writing."""
    try:
        read_only = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:
        raise UserError(f"{path}: this process has no open descriptor {number}; give --out a file") from None
    if read_only:
        raise UserError(f"{path}: descriptor {number} is open for reading only; give --out a file")
    return number


def _target(path: Path) -> Path:
    """The file `path`, with links resolved."""
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
    """Renames a complete file to `path`, or copies it if `path` is a mount point."""
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
    """Raises a UserError, before work starts, if no files can be written to the folder `path`, which need not exist;
    creates nothing."""
    with folder_errors(path):
        _check_room(resolved(path), path)


def refuse_other_job(out: Path | str, job: str) -> None:
    """Raises a UserError if the folder `out` holds the output of another command than `fastbert JOB`, which its
    manifest.json names. A damaged manifest is reported by its reader."""
    path = Path(out) / "manifest.json"
    try:
        manifest = read_json(path, "the manifest", dict) if path.is_file() else {}
    except UserError:
        return
    made = "pretrain" if "sessions" in manifest else manifest.get(JOB, job)
    if made != job:
        raise UserError(f"{out} holds the output of fastbert {brief(made, str)}; choose another --out")


def resolved(path: Path | str) -> Path:
    """Absolute path of the folder `path`, with links resolved. It need not exist."""
    return Path(os.path.realpath(path))


def _check_room(folder: Path, output: Path | str, name: str = "") -> None:
    """Raises a UserError if a file `name` cannot be written to `folder`, which need not exist.

    Args:
        output: the path given by the user, for error messages.
    """
    there, names = folder, [name]
    while not os.path.lexists(there):
        names.append(there.name)
        there = there.parent
    if there.is_symlink():  # all others are resolved
        raise UserError(f"cannot write {output}: a link in that path leads back to itself; remove it")
    if not there.is_dir():
        raise UserError(f"cannot write {output}: part of that path is a file; choose another folder")
    if max(len(os.fsencode(name)) for name in names) > os.pathconf(there, "PC_NAME_MAX"):
        raise UserError(f"cannot write {output}: a name in that path is too long; choose a shorter one")
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        raise UserError(f"{output} is on a read-only file system; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write {output}; choose another folder or change its permissions")
    if not os.statvfs(
        there
    ).f_blocks:  # a virtual file system, such as /proc: whether it can be written is known only after an attempt
        with folder_errors(output):
            temporary, handle = new_folder(there / "fastbert")
        os.close(handle)
        temporary.rmdir()


def is_filled_within(path: Path) -> bool:
    """Returns True if the folder `path`, resolved, must not be replaced (see the module's docstring)."""
    if not path.is_dir():
        return False
    return (
        not contents(path)
        or is_mount(path)
        or os.path.samefile(path, os.curdir)
        or not os.access(path.parent, os.W_OK | os.X_OK)
    )


def is_mount(path: Path) -> bool:
    """Returns True if a folder is a mount point, including bind mounts of the same file system."""
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
    """Yields a folder to fill, which becomes `path` when the block ends without an error: whole or not at all, except
    that a folder that is filled in place may lack the file `last` if the process is killed meanwhile.

    Args:
        first: the file that identifies the folder if the process is killed while filling it. It is written before the
            others, and the one of an older output is removed after the others.
        last: the file without which the folder cannot be opened.

    Raises:
        UserError: the folder cannot be written.
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
    """`names` in alphabetical order between `first` and `last`."""
    return sorted(names, key=lambda name: (name == last, name != first, name))


def move_contents(source: Path, target: Path, names: Sequence[str]) -> None:
    """Moves the files and folders `names` from `source` to `target` in this order and removes `source`. Both are on the
    same file system."""
    for name in names:
        os.rename(source / name, target / name)
        sync_folder(target)  # so that the disk has the same order
    shutil.rmtree(source)
    sync_folder(target)
