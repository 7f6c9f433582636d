"""JSON that other programs can read and in which damage is detected: no NaN or infinity, atomic writes, and hashes."""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.errors import UserError, brief
from fastbert.files import atomic_file
from fastbert.inputs import LARGEST_TEXT, read_text_input

DEEPEST = 64  # nested lists and objects
MOST_DIGITS = 310  # of a whole number; tokenizer_config.json has one with 31 digits if there is no maximum length
MOST_VALUES = 2**21  # per file, counted by commas; a value needs up to 30 times its size in memory


def write_json(path: Path | str, value: Any) -> None:
    """Writes the `json_text` of `value`, whole or not at all."""
    with atomic_file(path, "w") as file:
        file.write(json_text(value, indent=2) + "\n")


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON, with null for numbers that are not finite: JSON has no NaN and no infinity.

    Args:
        options: options of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # rarely: looking at all numbers first would take as long again
        return json.dumps(finite_or_none(value), allow_nan=False, **options)


def finite_or_none(value: Any) -> Any:
    """A JSON value with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {finite_or_none(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return value


def read_json(
    path: Path | str, what: str, shape: Any = object, most: int = LARGEST_TEXT, values: int = MOST_VALUES
) -> Any:
    """Reads the JSON in `path`; `what` names it in error messages.

    Args:
        shape: expected structure, for `check`.
        most: maximum number of bytes.
        values: maximum number of values.

    Raises:
        UserError: the file is missing, too large, not JSON, or has another structure.
    """
    path = Path(path)
    if not os.path.lexists(path):  # callers extend this message
        raise UserError(f"{what} {path} does not exist")
    if path.is_dir():
        raise UserError(f"{what} {path} is damaged: it is a folder")
    return parse_json(read_text_input(path, what, most), f"{what} {path}", shape, values)


def parse_json(text: str | bytes, where: str, shape: Any = object, values: int = MOST_VALUES) -> Any:
    """Parses JSON with at most `DEEPEST` levels and whole numbers of at most 64 bits.

    Args:
        where: names its origin in error messages.
        shape: expected structure, for `check`.
        values: maximum number of values.

    Raises:
        UserError: it is not such JSON, or has another structure.
    """
    if text.count(b"," if isinstance(text, bytes) else ",") >= values:
        raise UserError(f"{where} has more than {values:,} values, which is too many for such a file")
    try:
        value = json.loads(text, parse_int=_integer)
        _refuse_odd(value, escapes=(b"\\u" if isinstance(text, bytes) else "\\u") in text)
    except RecursionError:
        raise UserError(f"{where} is damaged: more than {DEEPEST} lists and objects inside each other") from None
    except ValueError as error:  # not JSON, not UTF-8
        raise UserError(f"{where} is damaged: {brief(str(error), str)}") from None
    return check(value, shape, where)


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"the number {brief(digits, str)} is too large")
    return int(digits)


def _refuse_odd(value: Any, escapes: bool) -> None:
    """Raises a ValueError for too many levels, and for half of a surrogate pair, which needs `escapes`."""
    depth, level = 0, [value]
    while level:
        if escapes:
            names = (name for one in level if isinstance(one, dict) for name in one)
            try:
                "".join([*names, *(one for one in level if isinstance(one, str))]).encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"a text in it is not Unicode text ({error.reason})") from None
        depth += any(isinstance(one, dict | list) for one in level)
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} lists and objects inside each other")
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [item for items in inner for item in items]


@dataclass(frozen=True)
class Whole:
    """Structure of a whole number from `least` to `most`."""

    least: int = 0
    most: int = 2**63 - 1


COUNT = Whole()


def check(value: Any, shape: Any, where: str, key: str = "") -> Any:
    """Returns `value` if it has the structure `shape`:

    - str, bool, dict, list, type(None): a value of this type; int: a whole number; float: a finite number; object: any;
    - `Whole`: a whole number in its range;
    - a tuple: one of these structures;
    - [shape]: a list of values with this structure;
    - {str: shape}: an object whose values have this structure;
    - {"key": shape, "key?": shape}: an object with these keys, those with "?" optional, and possibly more.

    Args:
        where: origin of the value, for errors.
        key: key of the value within it, for errors.

    Raises:
        UserError: a value is missing or has another structure; the message names its key.
    """
    if isinstance(shape, tuple):
        if not any(_fits(value, one) for one in shape):
            raise _unfit(value, " or ".join(map(_name, shape)), where, key)
        shape = next(one for one in shape if _fits(value, one))
    if not _fits(value, shape):
        raise _unfit(value, _name(shape), where, key)
    if isinstance(shape, list):
        for index, item in enumerate(value):
            check(item, shape[0], where, f"{key}[{index}]")
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            if name is str:
                for other, item in value.items():
                    check(item, inner, where, f"{key}.{brief(other, str)}" if key else brief(other, str))
                continue
            optional, name = name.endswith("?"), name.removesuffix("?")
            if name in value:
                check(value[name], inner, where, f"{key}.{name}" if key else name)
            elif not optional:
                raise UserError(f"{where} is damaged: {f'{key}.{name}' if key else name} is missing")
    return value


def _fits(value: Any, shape: Any) -> bool:
    """Returns True if the outermost level of `value` has this structure."""
    if shape is object:
        return True
    if isinstance(shape, Whole):
        return type(value) is int and shape.least <= value <= shape.most
    if shape is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    if isinstance(shape, list | dict):
        return isinstance(value, type(shape))
    return type(value) is shape


_NAMES = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


def _name(shape: Any) -> str:
    if isinstance(shape, Whole):
        return f"a whole number from {shape.least} to {shape.most}"
    return _NAMES[type(shape) if isinstance(shape, list | dict) else shape]


def _unfit(value: Any, wanted: str, where: str, key: str) -> UserError:
    found = _NAMES[type(value)] if value is None or isinstance(value, dict | list) else brief(value)
    if not key and wanted == "an object":
        return UserError(f"{where} is damaged: it holds no JSON object, but {found}")
    return UserError(f"{where} is damaged: {f'{key} is' if key else 'it holds'} {found}, not {wanted}")


def write_sealed(path: Path | str, record: dict[str, Any]) -> None:
    """Writes a JSON object with its seal, for `read_sealed`."""
    record = finite_or_none(record)
    write_json(path, {**record, "seal": seal_of(record)})


def read_sealed(path: Path | str, what: str, shape: Any, fix: str) -> dict[str, Any]:
    """Reads a JSON object written by `write_sealed`, without its seal. If an older version wrote it without a seal,
    only `shape` is checked.

    Args:
        what: names the file in error messages.
        shape: expected structure, for `check`.
        fix: advice for a damaged file, as the end of the message.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        record = read_json(path, what, dict)
        if record.pop("seal", None) not in (None, seal_of(record)):
            raise UserError(f"{what} {path} is damaged or was changed since it was written")
        return check(record, shape, f"{what} {path}")
    except UserError as error:
        raise UserError(f"{error}; {fix}") from None


def seal_of(record: dict[str, Any]) -> str:
    """SHA-256 of a JSON object without its key `seal`, which stores this hash."""
    bare = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()
