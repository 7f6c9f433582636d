"""Rows of Parquet files and of Arrow tables, read in small batches; memory does not grow with row groups or files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.data.columns import Columns
from fastbert.errors import UserError
from fastbert.inputs import open_input, raise_refusal

if TYPE_CHECKING:
    import pyarrow

# Rows decoded at a time: rows of a megabyte each then need only 64 MB.
ROWS = 64
PAGE_BUFFER = 2**20  # bytes of a column read ahead, instead of the whole column of a row group
FEATURES = b"huggingface"  # key under which `datasets` stores the features of the columns


def check_parquet(path: Path, columns: Columns) -> tuple[str, ...] | None:
    """Checks the schema at the end of the file and returns its `class_names`.

    Raises:
        UserError: the file is damaged, or a column is missing or contains no text.
    """
    import pyarrow.parquet

    with _damage(path), open_input(path) as file:
        schema = pyarrow.parquet.read_schema(file)
    check_schema(schema, columns, str(path))
    return class_names(schema, columns, str(path))


def check_schema(schema: "pyarrow.Schema", columns: Columns, where: str) -> None:
    """Raises a UserError that lists the columns if one is missing, occurs twice, or is not text."""
    columns.check(schema.names, where)
    for name in columns.texts:
        kind = schema.field(name).type
        if not is_text(kind) and not (columns.lists and is_list(kind) and is_text(kind.value_type)):
            known = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise UserError(f"{where}: the column {name!r} is {kind}, not text; {columns.remedy}; columns: {known}")


def is_text(kind: "pyarrow.DataType") -> bool:
    """Returns True if a column of this type contains text, also if it is dictionary-encoded."""
    import pyarrow.types

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return any(check(kind) for check in checks)


def is_list(kind: "pyarrow.DataType") -> bool:
    """Returns True if a cell of this type is a list, of variable or fixed length."""
    import pyarrow.types

    checks = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    return any(check(kind) for check in checks)


def column_names(path: Path) -> list[str]:
    """Names of all columns. Raises a UserError if the file is damaged."""
    import pyarrow.parquet

    with _damage(path), open_input(path) as file:
        return pyarrow.parquet.read_schema(file).names


def class_names(schema: "pyarrow.Schema", columns: Columns, where: str) -> tuple[str, ...] | None:
    """Names of the classes of a label column in id order, from the features that `datasets` stored in the file. The
    column may also contain lists. None if there are no names, or without `columns.class_names`.

    Raises:
        UserError: these features are damaged.
    """
    if not columns.class_names or columns.label is None or FEATURES not in (schema.metadata or {}):
        return None
    damaged = UserError(f"{where}: the features that datasets stored in it are damaged; write the file again")
    try:
        features = json.loads(schema.metadata[FEATURES])
    except (ValueError, RecursionError):
        raise damaged from None
    for key in ("info", "features", columns.label):
        if not isinstance(features, dict):
            raise damaged
        features = features.get(key)
        if features is None:
            return None
    if isinstance(features, dict) and isinstance(features.get("feature"), dict):  # a list
        features = features["feature"]
    elif isinstance(features, list) and len(features) == 1:  # a list, as written by older versions
        features = features[0]
    if not isinstance(features, dict) or features.get("_type") != "ClassLabel":
        return None
    names = features.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise damaged
    return tuple(names)


def parquet_rows(path: Path, columns: Columns) -> Iterator[tuple[int, int, list[Any]]]:
    """Yields (bytes of the file read, estimated by its rows; row from 1; cells) for every row.

    Raises:
        UserError: the file is damaged, a column is missing or contains no text, or text is not UTF-8.
    """
    import pyarrow.parquet

    size = path.stat().st_size
    with (
        _damage(path),
        open_input(path) as raw,
        pyarrow.parquet.ParquetFile(raw, buffer_size=PAGE_BUFFER, pre_buffer=False) as file,
    ):
        schema = file.schema_arrow
        check_schema(schema, columns, str(path))
        names = class_names(schema, columns, str(path))
        there = [name for name in columns.names if name in schema.names]
        # One thread: several would only load more columns into memory.
        batches = file.iter_batches(batch_size=ROWS, columns=there, use_threads=False)
        total = file.metadata.num_rows
        for number, cells in arrow_rows(batches, there, columns, str(path)):
            if names is not None:
                cells[-1] = _name(cells[-1], names, f"{path}, row {number}")
            yield size * number // total, number, cells


def arrow_rows(
    batches: Iterator["pyarrow.RecordBatch"], there: list[str], columns: Columns, where: str
) -> Iterator[tuple[int, list[Any]]]:
    """Yields (row from 1, cells) of Arrow batches that have the columns `there`."""
    number = 0
    for batch in batches:
        cells = [
            cells_of(batch.column(name), f"{where}, column {name!r}", number)
            if name in there
            else [None] * batch.num_rows
            for name in columns.names
        ]
        for row in zip(*cells, strict=True):
            number += 1
            yield number, list(row)


def cells_of(values: "pyarrow.Array | pyarrow.ChunkedArray", where: str, first: int) -> list[Any]:
    """The cells of a column; null is None.

    Args:
        first: number of previous rows, for error messages.

    Raises:
        UserError: a text is not UTF-8, which Arrow itself does not check.
    """
    try:
        return values.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: a row between {first + 1:,} and {first + len(values):,} is not UTF-8 text ({error}); "
            "write the file again from text"
        ) from None


def _name(value: Any, names: tuple[str, ...], where: str) -> Any:
    """The name of a class, or the names in a list; None for -1, which means a missing label in `datasets`."""
    if isinstance(value, list):
        return [_name(one, names, where) for one in value]
    if not isinstance(value, int) or isinstance(value, bool) or value == -1:
        return None if value == -1 else value
    if not 0 <= value < len(names):
        raise UserError(
            f"{where}: the label {value} is none of the {len(names)} labels that datasets defines in the file"
        )
    return names[value]


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Converts Arrow's errors to a UserError that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # UnicodeDecodeError: column names
        raise_refusal(error, path)
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is cut off, damaged or not a Parquet file ({reason}); fetch it again") from error
