"""Rules for text in every format: UTF-8, \\n as line end, no zero byte, no unpaired surrogate.

Files are decoded here line by line, with bounded memory; cells of tables pass through `clean`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastbert.data.formats import refuse_magic
from fastbert.errors import UserError
from fastbert.inputs import not_utf8, refuse_zero_bytes

READING = 2  # changes with these rules: an interrupted `prepare` that used other rules is not continued
BOM = b"\xef\xbb\xbf"
PIECE = 2**20  # bytes of a line read at a time
LONGEST_ROW = 2**26  # characters of a row of a table, which is in memory as a whole


def clean(text: str, where: str) -> str:
    """Returns a document or a cell with \\n at line ends and without byte order marks at its beginning.

    Args:
        where: file and row, for error messages.

    Raises:
        UserError: the text contains a zero character.
    """
    if "\0" in text:
        raise UserError(f"{where}: a zero character (NUL) in the text; remove it, or give text instead of binary data")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.lstrip("\ufeff")


def is_unicode(text: str) -> bool:
    """Returns False if `text` contains an unpaired surrogate, which escapes in JSON can produce."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def pieces(stream: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, text) of a file: lines that end with \\n, also instead of \\r\\n and \\r, as in Python's
    text mode. A line of more than PIECE bytes is yielded in pieces, the last of which has the line end. A byte order
    mark at the beginning is dropped.

    Raises:
        UserError: the file is binary or not UTF-8; the message names the line.
    """
    number, earlier, begun, rest, before = 1, 0, False, b"", b""
    while True:
        read = stream.readline(PIECE)
        whole = begun and not rest and read.endswith(b"\n")
        if whole and read.isascii() and b"\r" not in read and b"\0" not in read:  # common case: faster
            before = b""
            yield number, read.decode("ascii")
            number += 1
            continue
        line, rest = rest + read, b""
        if not line:
            return
        if not begun:
            refuse_magic(line, path)
            if line.startswith(BOM):
                line, begun = line[len(BOM) :], True
        if read and not line.endswith(b"\n"):
            line, rest = _whole_characters(line)
        if b"\0" in line:
            refuse_zero_bytes(path, "", line + rest, number, stream.read)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            start = len(before) + error.start
            raise not_utf8(path, "", before + line + rest, start, number, stream.read, earlier) from None
        before = line if rest else b""  # for the error message, in case a character is cut off
        earlier += not text.isascii()
        begun = begun or bool(line)
        if "\r" not in text:
            if text:
                yield number, text
                number += text.endswith("\n")
            continue
        *ended, last = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for one in ended:
            yield number, f"{one}\n"
            number += 1
        if last:
            yield number, last


def _whole_characters(line: bytes) -> tuple[bytes, bytes]:
    """A piece of a long line, and the bytes at its end that belong to the next piece: an incomplete character, or a \\r
    that may be the first half of \\r\\n."""
    if line.endswith(b"\r"):
        return line[:-1], b"\r"
    end = len(line)
    while end > 0 and len(line) - end < 4 and line[end - 1] & 0xC0 == 0x80:
        end -= 1
    if end > 0 and line[end - 1] >= 0xC0:
        return line[: end - 1], line[end - 1 :]
    return line, b""


def lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number, line) of a file, without line ends. Raises the errors of `pieces`, and a UserError if a line has
    more than LONGEST_ROW characters."""
    held: list[str] = []
    size = 0
    number = 1
    for number, piece in pieces(stream, path):
        if not held and piece.endswith("\n") and len(piece) <= LONGEST_ROW:  # nearly every line
            yield number, piece[:-1]
            continue
        size += len(piece)
        if size > LONGEST_ROW:
            raise UserError(f"{path}, line {number} has more than {LONGEST_ROW:,} characters; put each row on a line")
        if not piece.endswith("\n"):
            held.append(piece)
            continue
        yield number, "".join(held) + piece[:-1] if held else piece[:-1]
        held, size = [], 0
    if held:
        yield number, "".join(held)
