"""Rows of tables (JSONL, JSON arrays, CSV, TSV and Parquet), for sources of text and for tasks.

Text in cells follows the rules of `fastbert.data.text`, so it is the same in all formats. A new format is a function
and a line in `READERS`.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from fastbert.data.columns import Columns
from fastbert.data.formats import TABLES, check_name, opened, suffixes
from fastbert.data.json_rows import begins_array, check_cells, json_array, json_lines, may_be_wrong
from fastbert.data.parquet import check_parquet, column_names, parquet_rows
from fastbert.data.text import LONGEST_ROW, clean, lines
from fastbert.errors import UserError

JSONL_HINT = "write an object on each line; an array of objects is read from a file called .json"
JSON_HINT = (
    "a .json file must be an array of objects, or have an object on each line (jq -c '.NAME[]' converts an array NAME "
    "inside an object)"
)


DELIMITERS = (",", ";", "\t", "|")  # of a CSV

Cells = list[Any]
Fields = tuple[int, list[str]]


def read_rows(path: Path, columns: Columns) -> Iterator[tuple[int, str, Cells]]:
    """Yields (bytes of the file read, file and row for errors, cells of the texts and the label) for every row.

    A cell that is missing or null is None. Memory does not grow with the file.

    Raises:
        UserError: the file has another format or is damaged, a column is missing, a row has too many or too few fields,
            or a text is invalid; the message names file and line.
    """
    check_table(path)
    kind = suffixes(path)[0]
    if kind == ".parquet":
        for position, number, values in parquet_rows(path, columns):
            where = f"{path}, row {number}"
            yield position, where, values if columns.lists else _clean(values, where)
        return
    with opened(path) as (position, stream):
        for where, values in READERS[kind](stream, path, columns):
            yield position(), where, values if columns.lists else _clean(values, where)


def whole_rows(path: Path, texts: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file and row for errors, column -> cell) with all cells of every row, as they are in the file.

    Args:
        texts: columns of texts, by which the delimiter of a CSV is recognized.

    Raises:
        UserError: the file has another format or is damaged, two columns have the same name, or a row has too many or
            too few fields.
    """
    check_table(path)
    kind = suffixes(path)[0]
    if kind == ".parquet":
        names = tuple(column_names(path))
        for _, number, values in parquet_rows(path, Columns((), others=names)):
            yield f"{path}, row {number}", dict(zip(names, values, strict=True))
        return
    with opened(path) as (_, stream):
        if kind in (".csv", ".tsv"):
            fields = csv_fields(stream, path, Columns(texts)) if kind == ".csv" else tsv_fields(stream, path)
            names = tuple(name.strip() for name in next(fields, (0, []))[1])
            for number, values in pick(path, fields, Columns((), others=names), names):
                yield f"{path}, line {number}", dict(zip(names, values, strict=True))
        else:
            array = kind == ".json" and begins_array(stream)
            for where, text, row in json_array(stream, path) if array else json_lines(stream, path, JSONL_HINT):
                if may_be_wrong(text, [f'"{name}"' for name in row]):
                    check_cells(row, text, list(row), where)
                yield where, row


def _clean(values: Cells, where: str) -> Cells:
    """Applies `clean` to the texts in `values`."""
    for index, value in enumerate(values):
        if isinstance(value, str):
            values[index] = clean(value, where)
    return values


def check_table(path: Path) -> None:
    """Raises a UserError if the suffix is not that of a table format."""
    check_name(path)
    if suffixes(path)[0] not in TABLES:
        raise UserError(
            f"{path}: the suffix must be that of the file's format, one of {', '.join(TABLES)} (all but the last also "
            "with .gz, .xz or .zst)"
        )


def check_columns(path: Path, columns: Columns) -> None:
    """Checks the first row, or the schema of a Parquet file; raises the same errors as `read_rows`."""
    if suffixes(path)[0] == ".parquet":
        check_parquet(path, columns)
    else:
        next(read_rows(path, columns), None)


# --- CSV and TSV


def tsv_fields(stream: IO[bytes], path: Path) -> Iterator[Fields]:
    """Yields (line, fields). Quotes are ordinary characters; empty lines are skipped."""
    for number, line in lines(stream, path):
        if line:
            yield number, line.split("\t")


def csv_fields(stream: IO[bytes], path: Path, columns: Columns) -> Iterator[Fields]:
    """Yields (first line, fields), with double quotes around fields that need them and the `delimiter` of the first
    line; empty lines are skipped."""
    start, size = 1, 0
    numbered = lines(stream, path)
    first = next(((number, line) for number, line in numbered if line), (1, ""))

    def counted() -> Iterator[str]:
        nonlocal size
        for _, line in chain([first], numbered):
            size += len(line) + 1
            if size > LONGEST_ROW:
                most = f"{LONGEST_ROW:,} characters"
                raise UserError(
                    f"{path}, line {start}: this row has more than {most}; is one of its quotes not closed?"
                )
            yield f"{line}\n"

    csv.field_size_limit(LONGEST_ROW)  # a global setting, not used elsewhere; `counted` enforces the limit
    before = first[0] - 1  # empty lines
    start += before
    reader = csv.reader(counted(), strict=True, delimiter=delimiter(first[1], columns))
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start, size = before + reader.line_num + 1, 0
    except csv.Error as error:
        raise UserError(
            f'{path}, line {start} is not CSV: {error}; put double quotes around fields, "" within'
        ) from None


def delimiter(header: str, columns: Columns) -> str:
    """Delimiter of a CSV: a comma, or one of those that spreadsheets write in many countries.

    It is not the comma only if another delimiter yields a column that the comma does not, or if the line has no comma.
    """

    def names(separator: str) -> list[str]:
        return [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]

    for separator in DELIMITERS:
        if all(name in names(separator) for name in columns.texts):
            return separator
    return "," if "," in header else next((one for one in DELIMITERS if one in header), ",")


def pick(
    path: Path, rows: Iterator[Fields], columns: Columns, header: Sequence[str] | None = None, ragged: bool = False
) -> Iterator[tuple[int, Cells | None]]:
    """Yields (line, cells of `columns`) for rows of fields. The first row names the columns unless `header` does.

    Args:
        ragged: rows with too few fields become None, and too many fields are allowed.

    Raises:
        UserError: a column is missing or occurs twice, a row has another number of fields than the header, or there is
            no header.
    """
    first = 0
    if header is None:
        first, header = next(rows, (0, None))
        if header is None:
            raise UserError(f"{path} is empty; its first line must name the columns")
    header = [name.strip() for name in header]
    separated = suffixes(path)[0] == ".tsv" and len(header) == 1 and ("," in header[0] or ";" in header[0])
    hint = "its header has no tab; rename it to .csv, in which other delimiters are recognized" if separated else ""
    columns.check(header, f"{path}, line {first}" if first else str(path), hint)
    indices = [header.index(name) if name in header else None for name in columns.names]
    for number, fields in rows:
        if len(fields) < len(header) and ragged:
            yield number, None
            continue
        if len(fields) != len(header) and not ragged:
            tsv = "a TSV is read without quoting; if this one has quotes around fields, rename it to .csv"
            remedy = "double quotes go around a field with a delimiter" if suffixes(path)[0] == ".csv" else tsv
            count = f"{len(fields)} field{'s' * (len(fields) != 1)}"
            raise UserError(f"{path}, line {number} has {count}, not {len(header)}; fix the row ({remedy})")
        yield number, [None if index is None else fields[index] for index in indices]


def read_fields(stream: IO[bytes], path: Path, columns: Columns) -> Iterator[tuple[str, Cells]]:
    csv_or_tsv = csv_fields(stream, path, columns) if suffixes(path)[0] == ".csv" else tsv_fields(stream, path)
    for number, values in pick(path, csv_or_tsv, columns):
        yield f"{path}, line {number}", values


# --- JSON


def first_keys(path: Path) -> list[str]:
    """Names in the first object of a JSON file; empty if it has no object."""
    check_table(path)
    with opened(path) as (_, stream):
        array = suffixes(path)[0] == ".json" and begins_array(stream)
        rows = json_array(stream, path) if array else json_lines(stream, path, JSONL_HINT)
        return list(next(rows, ("", "", {}))[2])


def read_jsonl(stream: IO[bytes], path: Path, columns: Columns) -> Iterator[tuple[str, Cells]]:
    yield from _cells(json_lines(stream, path, JSONL_HINT), columns)


def read_json(stream: IO[bytes], path: Path, columns: Columns) -> Iterator[tuple[str, Cells]]:
    if begins_array(stream):
        yield from _cells(json_array(stream, path), columns)
    else:
        yield from _cells(json_lines(stream, path, JSON_HINT), columns, f"{columns.remedy}, or {JSON_HINT}")


def _cells(
    rows: Iterator[tuple[str, str, dict[str, Any]]], columns: Columns, hint: str = ""
) -> Iterator[tuple[str, Cells]]:
    names = columns.names
    keys = [f'"{name}"' for name in names]
    for where, text, row in rows:
        values = [row.get(name) for name in names]
        if None in values and not all(name in row for name in names):
            columns.check(list(row), where, hint)
        if may_be_wrong(text, keys):
            check_cells(row, text, names, where)
        yield where, values


READERS: dict[str, Callable[[IO[bytes], Path, Columns], Iterator[tuple[str, Cells]]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_fields,
    ".tsv": read_fields,
}
