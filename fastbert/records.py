"""JSON that other programs can read and damage shows in: no NaN and no infinity, whole files, and seals."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from fastbert.errors import UserError
from fastbert.files import atomic_file
from fastbert.inputs import read_text_input


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
    if not os.path.lexists(path):  # callers say what happens then
        raise UserError(f"{what} {path} does not exist")
    if path.is_dir():
        raise UserError(f"{what} {path} is damaged: it is a folder")
    text = read_text_input(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON; nested too deep
        raise UserError(f"{what} {path} is damaged: {error}") from None


def write_sealed(path: Path | str, record: dict[str, Any]) -> None:
    """Writes a JSON object with its seal, for `read_sealed`."""
    record = finite_or_none(record)
    write_json(path, {**record, "seal": seal_of(record)})


def read_sealed(path: Path | str, what: str, kinds: dict[str, type], fix: str) -> dict[str, Any]:
    """The JSON object that `write_sealed` wrote, without its seal. Older versions wrote none: then only `kinds` count.

    Args:
        what: names the file in errors.
        kinds: what must be there, and its type.
        fix: of a damaged file, as the end of the message.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        record = read_json(path, what)
    except UserError as error:
        raise UserError(f"{error}; {fix}") from None
    whole = isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items())
    if not whole or record.pop("seal", None) not in (None, seal_of(record)):
        raise UserError(f"{what} {path} is damaged or was changed since it was written; {fix}")
    return record


def seal_of(record: dict[str, Any]) -> str:
    """SHA-256 over a JSON object but for its key `seal`, which is where a file keeps the hash of its own content."""
    bare = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()
