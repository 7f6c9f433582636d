"""One's own tasks: what declares one, and rows out of JSONL, CSV, TSV and Parquet, each with the place it came from.

A new file format is one reader and one line in `READERS`.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.config import check_choices, choice
from fastbert.data.sources import BOM, MAGIC
from fastbert.errors import UserError, nearest
from fastbert.inputs import open_input

LONGEST_LINE = 2**26  # bytes
KINDS = ("classes", "number")


@dataclass(frozen=True)
class OwnTaskOptions:
    """A task of one's own, as YAML or as flags. Files are .jsonl, .csv, .tsv (read without quoting) or .parquet."""

    name: str | None = None
    """What the task is called in results (default: the name of its YAML file)."""
    train: str | None = None
    """File of the training examples; a path is relative to where fastbert runs, or else to the YAML file."""
    dev: str | None = None
    """File of the examples that choose the best epoch."""
    test: str | None = None
    """File of the examples to predict; their labels may be missing."""
    text: str = "text"
    """Column of the text, or of the first of a pair."""
    pair: str | None = None
    """Column of the second text of a pair."""
    label: str = "label"
    """Column of the label."""
    kind: str = choice("classes", KINDS, "kind of labels")
    """What the labels are: classes or number."""
    labels: str | None = None
    """Label words in their order, a comma between them (default: those of train, sorted). With two labels, the second
    is the positive one of F1, AUC and pairwise accuracy."""
    metrics: str | None = None
    """Names of metrics, a comma between them; the first chooses the best epoch (default: accuracy, or for numbers
    pearson, spearman)."""
    symmetric: bool = False
    """The order of the two texts means nothing, so that --symmetric may read both."""

    def __post_init__(self) -> None:
        check_choices(self)

    def check(self) -> None:
        """Sees that the options fit each other; apart from their making, for flags alone need not be a whole task.

        Raises:
            UserError: they do not.
        """
        if self.symmetric and self.pair is None:
            raise UserError("symmetric is for pairs; name the column of the second text with pair")
        if self.labels is not None and self.kind == "number":
            raise UserError("labels are given, but kind is number; drop labels or set kind: classes")
        for name, column in (("pair", self.pair), ("label", self.label)):
            if column == self.text:
                raise UserError(f"text and {name} are both the column {column!r}; name two columns")
        if self.pair is not None and self.pair == self.label:
            raise UserError(f"pair and label are both the column {self.pair!r}; name two columns")


class Row(NamedTuple):
    """One example as it stands in its file."""

    where: str
    """File and line, for errors."""
    text: str
    pair: str | None
    label: Any
    """A word or number as found; None where there is none."""


class OwnSource:
    """Reads the files of an `OwnTaskOptions`; `folder` is where relative paths are looked for second."""

    def __init__(self, options: OwnTaskOptions, folder: Path | None = None) -> None:
        options.check()
        self.options = options
        self.paths: dict[str, Path] = {}
        for split in ("train", "dev", "test"):
            if name := getattr(options, split):
                path = Path(name)
                beside = folder / path if folder is not None else path
                self.paths[split] = beside if beside.exists() and not path.exists() else path
                _reader(self.paths[split])
        if not self.paths:
            raise UserError("an own task needs files: name train and dev (and test, if there is one)")

    def rows(self, split: str, notes: list[str]) -> Iterator[Row]:
        """The rows of a split; those of test may have no label column.

        Raises:
            UserError: names file, line and remedy: missing file or column, no text, an empty text, a binary file.
        """
        options, path = self.options, self.paths[split]
        texts = [options.text] if options.pair is None else [options.text, options.pair]
        optional = options.label if split == "test" else None
        unit = "row" if path.suffix.lower() == ".parquet" else "line"
        for number, values in _reader(path)(path, [*texts, options.label], optional):
            yield make_row(f"{path}, {unit} {number}", texts, values)


def check_own_file(path: Path) -> None:
    """Raises a UserError if `path` is no file that can be read, or of no format that is."""
    _reader(path)
    open_input(path).close()


def make_row(where: str, columns: Sequence[str], values: Sequence[Any], may_be_empty: bool = False) -> Row:
    """A Row of the texts in `columns`, followed in `values` by the label.

    Raises:
        UserError: a text is no text, or is empty.
    """
    for column, value in zip(columns, values[:-1], strict=True):
        if not isinstance(value, str):
            kind = "missing" if value is None else f"of type {type(value).__name__}, not text"
            raise UserError(f"{where}: {column!r} is {kind}; mend the row or name another column")
        if not may_be_empty and not value.strip():
            raise UserError(f"{where}: the text {column!r} is empty; fill it in or drop the row")
    return Row(where, values[0], values[1] if len(columns) == 2 else None, values[-1])


def label_word(row: Row) -> str | None:
    """The label of a row as a word; None where there is none. Whole numbers, true and false are words too.

    Raises:
        UserError: the label is a fraction, a list, ...: not a class.
    """
    label = row.label
    if label is None or isinstance(label, str):
        return label.strip() or None if label else None
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return str(int(label))  # a table with a gap holds its whole numbers as 1.0
    hint = "set kind: number, or " if isinstance(label, float) else ""
    raise UserError(f"{row.where}: the label {label!r} is no class; {hint}give a word or a whole number")


def learn_labels(rows: Iterable[Row]) -> tuple[str, ...]:
    """The label words of the training rows, sorted (as numbers if all are whole numbers).

    Raises:
        UserError: a row has no label, there are fewer than two labels, or they are fractions.
    """
    found: dict[str, str] = {}  # word -> where it was first seen
    for row in rows:
        word = label_word(row)
        if word is None:
            raise UserError(f"{row.where} has no label; training needs one in every row")
        found.setdefault(word, row.where)
    if len(found) < 2:
        raise UserError(f"the training file holds {len(found)} label(s) ({', '.join(found)}); a task needs two or more")
    numbers = [_number(word) for word in found]
    if None not in numbers:
        if all(number.is_integer() for number in numbers):
            return tuple(sorted(found, key=lambda word: (float(word), word)))
        word = next(word for word in found if not float(word).is_integer())
        raise UserError(f"{found[word]}: the label {word!r} is a number, no class; set kind: number")
    return tuple(sorted(found))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) without line ends, which are \\n, \\r\\n or \\r as where Python reads text; a BOM is dropped.

    Raises:
        UserError: the file is missing, a folder, binary, or not UTF-8.
    """
    number = 0
    with _opened(path) as file:
        while raw := file.readline(LONGEST_LINE):
            if len(raw) == LONGEST_LINE:
                raise UserError(f"{path}, line {number + 1} is longer than {LONGEST_LINE:,} bytes; write a row a line")
            if number == 0:
                kind = next((kind for magic, kind in MAGIC.items() if raw.startswith(magic)), None)
                if kind:
                    raise UserError(f"{path} is a {kind} file, not text; unpack it or give it the suffix that says so")
                raw = raw.removeprefix(BOM)
            if b"\0" in raw:
                raise UserError(f"{path}, line {number + 1}: a zero byte; the file is binary, give UTF-8 text")
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number + 1} is not UTF-8 text (byte 0x{raw[error.start]:02x}); "
                    "convert it, for example with: iconv -f latin1 -t utf-8"
                ) from None
            for piece in line.removesuffix("\n").removesuffix("\r").split("\r"):
                number += 1
                yield number, piece


def _opened(path: Path) -> Any:
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    return open_input(path)


def tsv_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, fields), quotes being characters like any other; empty lines are passed over."""
    for number, line in text_lines(path):
        if line:
            yield number, line.split("\t")


def csv_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) with double quotes around fields that need them; empty lines are passed over."""
    reader = csv.reader((line + "\n" for _, line in text_lines(path)), strict=True)
    start = 1
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f'{path}, line {start} is not CSV: {error}; put double quotes around fields, "" within'
        ) from None


def pick(
    path: Path,
    rows: Iterator[tuple[int, list[str]]],
    wanted: Sequence[str],
    optional: str | None = None,
    header: Sequence[str] | None = None,
    ragged: bool = False,
) -> Iterator[tuple[int, list[str | None] | None]]:
    """(line, the wanted columns) of rows of fields; the first row names the columns unless `header` does.

    Args:
        optional: a wanted column that may be missing: None in all rows.
        ragged: rows with too few fields come as None, and too many are no error.

    Raises:
        UserError: a column is missing or there twice, or a row has another number of fields than the header.
    """
    first, header = (0, header) if header is not None else next(rows, (1, []))
    header = [name.strip() for name in header]
    places = []
    for name in wanted:
        if header.count(name) > 1:
            raise UserError(f"{path}, line {first}: {header.count(name)} columns are called {name!r}; rename one")
        _check_column(path, name, header, optional)
        places.append(header.index(name) if name in header else None)
    for number, fields in rows:
        if len(fields) < len(header) and ragged:
            yield number, None
            continue
        if len(fields) != len(header) and not ragged:
            raise UserError(
                f"{path}, line {number} has {len(fields)} fields, not {len(header)}; mend the row"
                + ("" if path.suffix == ".csv" else " (a TSV is read without quoting: no tab or line end in a text)")
            )
        yield number, [None if place is None else fields[place] for place in places]


def _check_column(path: Path | str, name: str, columns: Sequence[str], optional: str | None) -> None:
    if name not in columns and name != optional:
        hint = nearest(name, columns) if columns else "it has no columns"
        raise UserError(f"{path} has no column {name!r}; {hint}")


def read_tsv(path: Path, wanted: Sequence[str], optional: str | None) -> Iterator[tuple[int, list[Any]]]:
    return pick(path, tsv_fields(path), wanted, optional)


def read_csv(path: Path, wanted: Sequence[str], optional: str | None) -> Iterator[tuple[int, list[Any]]]:
    return pick(path, csv_fields(path), wanted, optional)


def read_jsonl(path: Path, wanted: Sequence[str], optional: str | None) -> Iterator[tuple[int, list[Any]]]:
    """(line, the wanted fields) of one object a line."""
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is a JSON {type(row).__name__}, not an object; write objects")
        for name in wanted:
            _check_column(f"{path}, line {number}", name, list(row), optional)
            value = row.get(name)
            if "\\u" in line and isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
                raise UserError(f"{path}, line {number}: {name!r} holds half of a surrogate pair, no text; mend it")
        yield number, [row.get(name) for name in wanted]


def read_parquet(path: Path, wanted: Sequence[str], optional: str | None) -> Iterator[tuple[int, list[Any]]]:
    """(row from 1, the wanted columns)."""
    import pyarrow
    import pyarrow.parquet

    with _opened(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            yield from column_rows(path, table.schema_arrow.names, table.iter_batches(), wanted, optional)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged or no Parquet file ({error}); fetch it again") from None


def column_rows(
    path: Path | str, names: Sequence[str], batches: Iterable[Any], wanted: Sequence[str], optional: str | None
) -> Iterator[tuple[int, list[Any]]]:
    """(row from 1, the wanted columns) of Arrow batches whose columns are `names`."""
    for name in wanted:
        _check_column(path, name, names, optional)
    number = 0
    for batch in batches:
        columns = [batch.column(name).to_pylist() if name in names else [None] * batch.num_rows for name in wanted]
        for values in zip(*columns, strict=True):
            number += 1
            yield number, list(values)


READERS = {".jsonl": read_jsonl, ".csv": read_csv, ".tsv": read_tsv, ".parquet": read_parquet}


def _reader(path: Path) -> Any:
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: the suffix says what is in a file; give one of {', '.join(READERS)}")
    return READERS[path.suffix.lower()]
