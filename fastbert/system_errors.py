"""Conversion of system errors (space, memory, permissions, limits, broken installations) to user errors.

`fastbert.inputs` and `fastbert.files` name the file that was read or written. Any other system error, for example from
a library, is converted at the top of a process: in `fastbert.cli` and in the workers of a sweep. Everything else is an
internal error and keeps its traceback.
"""

import errno
import os
import re
import resource
import sys
import traceback

from fastbert.errors import UserError, brief

MEMORY_REMEDY = (
    "use a smaller --machine.micro-batch-size (the results do not change), fewer --workers, shorter sequences or a "
    "smaller model"
)
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's message, without an error number
NO_MEMORY = re.compile(
    r"(can't|cannot|failed to|unable to) allocate|out of memory|bad[_ ]alloc|alloc_failed", re.IGNORECASE
)
_DISK_FULL = "free space or choose another folder"
_CHECK_DISK = "check its disk, or choose another folder"
REASONS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", _DISK_FULL),
    errno.EDQUOT: ("the disk quota is used up", _DISK_FULL),
    errno.EFBIG: (
        "a file is larger than the limit (ulimit -f, or its file system's)",
        "raise the limit or choose another folder",
    ),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
    errno.EACCES: ("no permission", "change the permissions, or give another path"),
    errno.EPERM: ("no permission", "change the permissions, or give another path"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs, or ask its administrator"),
    errno.ELOOP: ("a link leads back to itself or is not followed", "remove it"),
    errno.ENAMETOOLONG: ("a name is too long", "choose a shorter one"),
    errno.EBUSY: ("it is in use", "stop what uses it, or choose another path"),
    errno.ETXTBSY: ("it is a running program", "stop it, or choose another path"),
    errno.EIO: ("the disk reports an error", _CHECK_DISK),
    errno.ESTALE: ("the network file system lost it", _CHECK_DISK),
    errno.ENODEV: ("its device is missing", _CHECK_DISK),
    errno.ENXIO: ("its device is missing", _CHECK_DISK),
    errno.ETIMEDOUT: ("the network file system does not answer", _CHECK_DISK),
    errno.EREMOTEIO: ("the network file system reports an error", _CHECK_DISK),
    errno.EAGAIN: ("the limit of processes is reached", "raise it (ulimit -u), or use fewer --workers"),
}
"""Error number -> problem and remedy."""
_WITHOUT_NUMBER = {
    "can't start new thread": REASONS[errno.EAGAIN],
    "No usable temporary directory": ("no folder for temporary files can be written", "set TMPDIR to one that can"),
    "Could not determine home directory": ("there is no home directory", "set HOME, or XDG_CACHE_HOME to a folder"),
}


def reason(error: OSError) -> tuple[str, str] | None:
    """Problem and remedy; None if it may be an internal error."""
    if error.errno is None and _SHORT_WRITE.search(str(error)):
        limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        return REASONS[errno.EFBIG if limited else errno.ENOSPC]
    return REASONS.get(error.errno)


def out_of_memory(error: BaseException) -> bool:
    """Returns True if the machine or its GPU ran out of memory, which Python, PyTorch and C++ report differently."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def user_error(error: BaseException) -> UserError | None:
    """Converts `error` to a user error if the user can fix it; None if it is an internal error."""
    if isinstance(error, UserError):
        return error
    if out_of_memory(error):
        first = " ".join((str(error).strip().splitlines() or [""])[0].split())
        return UserError(f"out of memory{f' ({brief(first, str)})' if first else ''}; {MEMORY_REMEDY}")
    if "Too many open files" in str(error) and getattr(error, "errno", None) is None:  # libraries in Rust and C++
        return UserError("{}; {}".format(*REASONS[errno.EMFILE]))
    for words, (what, remedy) in _WITHOUT_NUMBER.items():
        if isinstance(error, RuntimeError | FileNotFoundError) and words in str(error):
            return UserError(f"{what}; {remedy}")
    if isinstance(error, ImportError) or (isinstance(error, OSError) and "shared object" in str(error)):
        package = _broken_package(error)
        if package is not None:
            return UserError(
                f"the package {package} cannot be imported ({brief(str(error), str)}); install the requirements again, "
                "in fastbert's checkout: pip install -e ."
            )
    if isinstance(error, OSError) and (found := reason(error)):
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        where = f": {' -> '.join(names)}" if names else ""
        return UserError(f"{found[0]}{where}; {found[1]}")
    return None


def _broken_package(error: BaseException) -> str | None:
    """The package that could not be imported, or whose import failed; None if it is a package of fastbert."""
    name = getattr(error, "name", None)
    if not name:  # a library that cannot be loaded: find the package that uses it
        for frame, _ in traceback.walk_tb(error.__traceback__):
            module = frame.f_globals.get("__name__", "")
            if module.split(".")[0] not in sys.stdlib_module_names:
                name = module
    package = (name or "").split(".")[0]
    return None if package in ("", "__main__", "fastbert", "fastbert_kernels") else package
