"""Files that somebody names as an input, opened and read in one way: what cannot be read is a UserError that says why,
nothing waits for a pipe that nobody fills, and a file read whole has a limit."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from fastbert.errors import UserError, brief, closest
from fastbert.system_errors import out_of_memory, reason

Result = TypeVar("Result")

LARGEST_TEXT = 64 * 2**20  # bytes of a configuration file, a record or a vocabulary that is read whole
CHUNK = 2**20  # bytes read at once
NEAR_NAMES = 200  # a folder with more names is not searched for the one that was meant


class UnreadableError(UserError):
    """What is there cannot be read now, which says nothing of its content: nothing is to be replaced because of it."""


def read_or_problem(read: Callable[..., Result], *arguments: Any) -> tuple[Result | None, str]:
    """What `read` gives, or None and what is wrong with the content.

    Raises:
        UnreadableError: it cannot be read now.
    """
    try:
        return read(*arguments), ""
    except UnreadableError:
        raise
    except UserError as error:
        return None, str(error)


def open_input(path: Path | str, what: str = "") -> IO[bytes]:
    """The regular file `path`, open for reading bytes.

    Args:
        what: names the file in errors, such as "configuration file".

    Raises:
        UserError: there is no such file, no permission to read it, or it is a folder, a pipe or a device.
    """
    with input_errors(path, what):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            mode = os.fstat(handle).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            if not stat.S_ISREG(mode):
                raise UserError(
                    f"{named(path, what)} is a pipe or a device, not a file; write what it gives into a file first"
                )
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise


def check_folder(path: Path | str, what: str = "") -> None:
    """Raises a UserError if there is no folder `path` that can be listed."""
    with input_errors(path, what):
        try:
            os.scandir(path).close()
        except NotADirectoryError:
            if not os.path.isfile(path):
                raise
            raise UserError(f"{named(path, what)} is a file; give a folder") from None


def read_input(path: Path | str, what: str = "", most: int = LARGEST_TEXT) -> bytes:
    """The content of the regular file `path`.

    Raises:
        UserError: as `open_input`, or the file has more than `most` bytes.
    """
    content = bytearray()
    with open_input(path, what) as file, input_errors(path, what):
        while len(content) <= most and (part := file.read(min(CHUNK, most + 1 - len(content)))):
            content += part
    if len(content) > most:
        raise UserError(f"{named(path, what)} has more than {most:,} bytes, which is too large for such a file")
    return bytes(content)


def read_text_input(path: Path | str, what: str = "", most: int = LARGEST_TEXT) -> str:
    """The UTF-8 text in the regular file `path`, without a byte order mark.

    Raises:
        UserError: as `read_input`, or the text is not UTF-8 or holds a zero byte.
    """
    content = read_input(path, what, most)
    refuse_zero_bytes(path, what, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, what, content, error.start) from None


def not_utf8(
    path: Path | str,
    what: str,
    content: bytes,
    start: int,
    line: int = 1,
    more: Callable[[int], bytes] | None = None,
    earlier: int = 0,
) -> UserError:
    """The error for a file that is not UTF-8: what it probably is, and the command that converts it.

    Args:
        content: a part of the file, from the beginning of a line; its byte `start` is no UTF-8.
        line: the number of that line in the file.
        more: reads up to this many bytes of what follows, which make the guess better.
        earlier: lines before it with characters outside ASCII, all of them right.
    """
    # Imported here, where a file is refused: its tables take longer to make than most files to read.
    from fastbert.encodings import LOOKED_AT, explain

    if more is not None:
        content += more(LOOKED_AT)
    number = line + content.count(b"\n", 0, start)
    return UserError(
        f"{named(path, what)} is not UTF-8 text (byte 0x{content[start]:02x}, line {number}): "
        f"{explain(content, start, path, earlier)}"
    )


def refuse_zero_bytes(
    path: Path | str,
    what: str,
    content: bytes,
    line: int = 1,
    more: Callable[[int], bytes] | None = None,
) -> None:
    """Raises if `content` holds a zero byte, as binary files do, and UTF-16.

    Args:
        content, line, more: as for `not_utf8`.

    Raises:
        UserError: says where, and for UTF-16 and UTF-32 how to convert the file.
    """
    if (start := content.find(b"\0")) < 0:
        return
    from fastbert.encodings import LOOKED_AT, wide

    if more is not None:
        content += more(LOOKED_AT)
    if wide(content):
        raise not_utf8(path, what, content, start, line)
    number = line + content.count(b"\n", 0, start)
    raise UserError(f"{named(path, what)} is binary, not text: a zero byte in line {number}; give UTF-8 text")


def refuse_slash(path: str) -> None:
    """Raises a UserError if `path` ends with a slash and is a file: `Path` drops the slash that the system refuses."""
    if path.endswith("/") and os.path.isfile(path.rstrip("/")):
        raise UserError(f"{path} ends with a slash and is a file, no folder; leave the slash out")


def named(path: Path | str, what: str = "") -> str:
    return f"{what} {path}" if what else f"{path}"


@contextmanager
def input_errors(path: Path | str, what: str = "") -> Iterator[None]:
    """Turns what the operating system reports while `path`, a file or a folder, is read into a UserError."""
    name = named(path, what)
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{name} does not exist{near_name(Path(path)) or '; check the path'}") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder; give a file") from None
    except NotADirectoryError:
        raise UserError(f"{name} does not exist: part of that path is a file; check the path") from None
    except PermissionError:
        raise UnreadableError(f"no permission to read {name}; change its permissions or give another") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{name} is a link that leads back to itself; remove it or give another") from None
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{brief(name, str)}: a name in that path is too long; check the path") from None
        if error.errno == errno.ENXIO:
            raise UserError(f"{name} is a socket or a device, not a file; give a file") from None
        if error.errno == errno.EIO:  # damage, to be treated as such
            raise UserError(f"{name} cannot be read: {error.strerror}; check its disk") from None
        if out_of_memory(error) or (found := reason(error)) is None:
            raise
        raise UnreadableError(f"{name} cannot be read: {found[0]}; {found[1]}") from None
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise UserError(f"{name!r} is no path: it holds a zero byte") from None


def raise_refusal(error: BaseException, path: Path | str, what: str = "") -> None:
    """Raises `error`, which a library raised while it read `path`, if the system refused to read (a UserError) or ran
    out of memory. Otherwise the file is damaged, and the caller reports that."""
    if out_of_memory(error):
        raise error
    if isinstance(error, OSError) and reason(error):
        with input_errors(path, what):
            raise error


def near_name(path: Path) -> str:
    """A name in the folder of `path` that may be meant, as "; did you mean ...?", or why the path is none that exists;
    empty if nothing is known."""
    if path.parts[:1] == ("~",):
        return "; ~ is not the home folder within quotes and after =: give the whole path"
    if path.parts and path.parts[0] in ("http:", "https:", "ftp:", "s3:", "gs:"):
        return "; it is an address, and nothing is downloaded here: download the file first and give its path"
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for _, entry in zip(range(NEAR_NAMES), entries, strict=False)]
    except OSError:
        return ""
    close = closest(path.name, names, 0.65) if len(names) < NEAR_NAMES else None
    return f"; did you mean {close!r}?" if close else ""
