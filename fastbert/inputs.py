"""Opening and reading of input files: a file that cannot be read raises a UserError with the reason, pipes are refused
instead of waiting for them, and a file that is read as a whole has a maximum size."""

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

LARGEST_TEXT = 64 * 2**20  # bytes of a configuration file, a record or a vocabulary
CHUNK = 2**20  # bytes read at a time
NEAR_NAMES = 200  # a folder with more names is not searched for similar ones


class UnreadableError(UserError):
    """An existing file currently cannot be read. Its content may be intact, so it must not be replaced."""


def read_or_problem(read: Callable[..., Result], *arguments: Any) -> tuple[Result | None, str]:
    """The result of `read`, or None and the problem with the content.

    Raises:
        UnreadableError: the file currently cannot be read.
    """
    try:
        return read(*arguments), ""
    except UnreadableError:
        raise
    except UserError as error:
        return None, str(error)


def open_input(path: Path | str, what: str = "") -> IO[bytes]:
    """Opens the regular file `path` for reading bytes.

    Args:
        what: description of the file in error messages, such as "configuration file".

    Raises:
        UserError: the file does not exist, cannot be read, or is a folder, a pipe or a device.
    """
    with input_errors(path, what):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            mode = os.fstat(handle).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            if not stat.S_ISREG(mode):
                raise UserError(
                    f"{named(path, what)} is a pipe or a device, not a file; write its content to a file first"
                )
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise


def check_folder(path: Path | str, what: str = "") -> None:
    """Raises a UserError if `path` is not a folder that can be listed."""
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
        UserError: as in `open_input`, or the file has more than `most` bytes.
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
        UserError: as in `read_input`, or the text is not UTF-8 or contains a zero byte.
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
    """Error for a file that is not UTF-8, with its probable encoding and the command that converts it.

    Args:
        content: part of the file, from the beginning of a line; its byte `start` is not UTF-8.
        line: the number of that line in the file.
        more: reads up to the given number of following bytes, which improve the guess.
        earlier: number of earlier lines with non-ASCII characters, all valid.
    """
    # Imported only when a file is refused, because building its tables takes longer than reading most files.
    from fastbert.encodings import EXAMINED, explain

    if more is not None:
        content += more(EXAMINED)
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
    """Refuses content with a zero byte, which is binary or UTF-16.

    Args:
        content, line, more: as in `not_utf8`.

    Raises:
        UserError: there is a zero byte; the message names the line, and explains the conversion of UTF-16 and UTF-32.
    """
    if (start := content.find(b"\0")) < 0:
        return
    from fastbert.encodings import EXAMINED, wide

    if more is not None:
        content += more(EXAMINED)
    if wide(content):
        raise not_utf8(path, what, content, start, line)
    number = line + content.count(b"\n", 0, start)
    raise UserError(f"{named(path, what)} is binary, not text: a zero byte in line {number}; give UTF-8 text")


def refuse_slash(path: str) -> None:
    """Raises a UserError if `path` is a file but ends with a slash, which the system would refuse and `Path` drops."""
    if path.endswith("/") and os.path.isfile(path.rstrip("/")):
        raise UserError(f"{path} ends with a slash but is a file, not a folder; leave out the slash")


def named(path: Path | str, what: str = "") -> str:
    return f"{what} {path}" if what else f"{path}"


@contextmanager
def input_errors(path: Path | str, what: str = "") -> Iterator[None]:
    """Converts errors of the operating system while the file or folder `path` is read to a UserError."""
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
        if error.errno == errno.EIO:  # treated as a damaged file
            raise UserError(f"{name} cannot be read: {error.strerror}; check its disk") from None
        if out_of_memory(error) or (found := reason(error)) is None:
            raise
        raise UnreadableError(f"{name} cannot be read: {found[0]}; {found[1]}") from None
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise UserError(f"{name!r} is not a path: it contains a zero byte") from None


def raise_refusal(error: BaseException, path: Path | str, what: str = "") -> None:
    """Raises `error`, which a library raised while reading `path`, again if memory ran out or, as a UserError, if the
    system refused to read. Otherwise the file is damaged, which the caller reports."""
    if out_of_memory(error):
        raise error
    if isinstance(error, OSError) and reason(error):
        with input_errors(path, what):
            raise error


def near_name(path: Path) -> str:
    """A similar name in the folder of `path`, as "; did you mean ...?", or a reason why the path does not exist; empty
    if nothing is known."""
    if path.parts[:1] == ("~",):
        return "; ~ does not mean the home folder within quotes or after =: give the whole path"
    if path.parts and path.parts[0] in ("http:", "https:", "ftp:", "s3:", "gs:"):
        return "; it is a URL, and nothing is downloaded: download the file first and give its path"
    if path.is_symlink():
        return "; it is a link to a path that does not exist"
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for _, entry in zip(range(NEAR_NAMES), entries, strict=False)]
    except OSError:
        return ""
    close = closest(path.name, names, 0.65) if len(names) < NEAR_NAMES else None
    return f"; did you mean {close!r}?" if close else ""
