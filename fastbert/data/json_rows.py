"""Rows of JSON files: an object on each line, or an array of objects, which are read one by one in bounded memory."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from fastbert.data.text import LONGEST_ROW, is_unicode, lines, pieces
from fastbert.errors import UserError, brief

WINDOW = 2**16  # characters of an array read at a time, if its objects fit
_SPACE = re.compile(r"[ \t\n]*")
_NEAR = 16  # characters: if an object is cut off within a literal or escape, parsing fails this close to the end
_UNTERMINATED = "Unterminated string"
_KINDS = {str: "string", list: "list", bool: "boolean", int: "number", float: "number", type(None): "null"}


def json_lines(stream: IO[bytes], path: Path, hint: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (file and line, JSON, object) for each line; blank lines are skipped.

    Args:
        hint: advice for a file with another structure.

    Raises:
        UserError: a line is not JSON or not an object; the message names the line.
    """
    name, scan = str(path), json.JSONDecoder().scan_once
    for number, line in lines(stream, path):
        if not line or line.isspace():
            continue
        where = f"{name}, line {number}"
        try:
            try:
                row, end = scan(line, 0)
            except StopIteration:  # no value begins here
                end = None
            if end != len(line):  # white space around the object, or invalid JSON
                row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({_reason(error)}); {hint}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is a JSON {_KINDS[type(row)]}, not an object; {hint}")
        yield where, line, row


def json_array(stream: IO[bytes], path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (file and row, JSON, object) for each object of an array, with rows counted from 1.

    Raises:
        UserError: it is not JSON, is cut off, or contains something other than objects; the message names the row.
    """
    window = _Window(pieces(stream, path))
    window.take()  # the bracket
    number, ended = 0, window.next()
    if ended == "]":
        window.take()
    else:
        while ended != "]":
            number += 1
            where = f"{path}, row {number}"
            row, text = _element(window, where)
            if not isinstance(row, dict):
                raise UserError(
                    f"{where} is a JSON {_KINDS[type(row)]}, not an object; write objects with a name for each column, "
                    "as jq -c '.[] | {text: .}' FILE.json > FILE.jsonl does with an array of texts"
                )
            yield where, text, row
            ended = window.take()
            if ended not in (",", "]"):
                raise UserError(
                    f"{path} is not JSON: after row {number} comes {ended!r}, not a comma or the end of the array"
                    if ended
                    else f"{path} ends after row {number}, within the array; it is cut off: fetch it again"
                )
    if ended := window.take():
        raise UserError(f"{path} is not JSON: {ended!r} follows the end of its array; remove it")


class _Window:
    """The part of a file in memory; `at` is the index of the first character that is not parsed yet."""

    def __init__(self, source: Iterator[tuple[int, str]]) -> None:
        self.text, self.at = "", 0
        self._source = source

    def next(self) -> str:
        """Moves `at` to the next character that is not white space and returns it; empty at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self) -> str:
        """Returns the character of `next` and moves past it."""
        character = self.next()
        self.at += len(character)
        return character

    def more(self) -> bool:
        """Drops the parsed part and doubles the remaining text by reading more, so that long rows take linear time."""
        parts, size = [self.text[self.at :]], 0
        most = max(WINDOW, len(parts[0]))
        while size < most and (piece := next(self._source, None)):
            parts.append(piece[1])
            size += len(piece[1])
        self.text, self.at = "".join(parts), 0
        return size > 0


def _element(window: _Window, where: str) -> tuple[Any, str]:
    """The next value of an array, and its JSON."""
    window.next()
    while True:
        try:
            row, end = json.JSONDecoder().raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            cut = error.pos >= len(window.text) - _NEAR or error.msg.startswith(_UNTERMINATED)
            if cut and len(window.text) - window.at > LONGEST_ROW:
                raise UserError(
                    f"{where} has more than {LONGEST_ROW:,} characters, or a quote that is not closed"
                ) from None
            if cut and window.more():
                continue
            raise UserError(f"{where} is {'cut off' if cut else 'not JSON'} ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({_reason(error)})") from None
        text, window.at = window.text[window.at : end], end
        return row, text


def begins_array(stream: IO[bytes]) -> bool:
    """Returns True if the first character of a buffered stream, after white space, is a bracket."""
    return stream.peek(WINDOW).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def may_be_wrong(text: str, keys: Sequence[str]) -> bool:
    """Returns True if `check_cells` may find an error in a row; cheap, because it is called for every row.

    Args:
        text: the JSON of the row.
        keys: the columns to read, in quotes.
    """
    if "\\u" in text:
        return True
    for key in keys:  # noqa: SIM110 (a generator for every row takes longer)
        if text.count(key) > 1:
            return True
    return False


def check_cells(row: dict[str, Any], text: str, names: Sequence[str], where: str) -> None:
    """Checks the cells of a row for which `may_be_wrong` is True.

    Args:
        text: the JSON of `row`.
        names: the columns to read.

    Raises:
        UserError: a column occurs twice, or contains an unpaired surrogate.
    """
    if "\\u" in text:
        for name in names:
            if not all(map(is_unicode, _texts(row.get(name)))):
                raise UserError(
                    f"{where}: {brief(name)} contains half of a surrogate pair, which is not text; fix the row"
                )
    if any(text.count(f'"{name}"') > 1 for name in names):
        counts: Counter[str] = Counter()

        def outermost(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            counts.clear()  # inner objects are complete before the outer one
            counts.update(name for name, _ in pairs)
            return {}

        json.loads(text, object_pairs_hook=outermost)
        for name in names:
            if counts[name] > 1:
                raise UserError(f"{where} has {brief(name)} twice; leave one of them out")


def _texts(value: Any) -> Iterator[str]:
    """The strings in a JSON value, at any depth."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, list | dict):
            rest += [*one, *one.values()] if isinstance(one, dict) else one


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else brief(str(error), str)
