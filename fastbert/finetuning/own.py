"""Custom tasks: what declares one, and rows of its tables, each with the place it came from."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.config import choice
from fastbert.data.columns import Columns
from fastbert.data.formats import suffixes
from fastbert.data.parquet import read_class_names
from fastbert.data.tables import check_table, read_rows
from fastbert.errors import OptionError, UserError, brief
from fastbert.inputs import open_input, refuse_slash
from fastbert.ranges import check_values, number_of, text_problem

KINDS = ("classes", "number")


@dataclass(frozen=True)
class OwnTaskOptions:
    """A custom task, as YAML or as flags. Files are tables: .jsonl, .ndjson, .json (an array of objects), .csv, .tsv
    (read without quoting), all of these also as .gz, .xz or .zst, or .parquet."""

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
    """Label words in their order, a comma between them, double quotes around one with a comma (default: those of train,
    sorted; in Parquet with ClassLabel names, these in their order). With two labels, the second is the positive one of
    F1, AUC and pairwise accuracy."""
    metrics: str | None = None
    """Names of metrics, a comma between them; the first chooses the best epoch (default: accuracy, or for numbers
    pearson, spearman)."""
    symmetric: bool = False
    """The order of the two texts means nothing, so that --symmetric may read both."""

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("labels", "metrics"):
            value = getattr(self, name)
            if value is not None and not all(word.strip() for word in value.split(",")):
                raise OptionError(self, name, f"must be names with a comma between them, not {brief(value)}")

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
                refuse_slash(name)
                path = Path(name)
                beside = folder / path if folder is not None else path
                self.paths[split] = beside if beside.exists() and not path.exists() else path
                check_table(self.paths[split])
        if not self.paths:
            raise UserError("an own task needs files: name train and dev (and test, if there is one)")

    def columns(self, split: str) -> Columns:
        """The columns of a split; those of test may have no label column."""
        options = self.options
        return Columns(
            (options.text,) if options.pair is None else (options.text, options.pair),
            options.label,
            label_may_lack=split == "test",
            remedy="choose the columns with text, pair and label (--own.text, ...)",
            class_names=True,
        )

    def rows(self, split: str, notes: list[str]) -> Iterator[Row]:
        """The rows of a split.

        Raises:
            UserError: names file, line and remedy: missing file or column, no text, an empty text, a binary file.
        """
        columns = self.columns(split)
        for _, where, values in read_rows(self.paths[split], columns):
            yield make_row(where, columns.texts, values)

    def check_rows(self, split: str) -> None:
        """Looks at the first row of a split.

        Raises:
            UserError: there is none, or as `rows`.
        """
        if next(self.rows(split, []), None) is None:
            raise UserError(f"{self.paths[split]} holds no rows; give a file with rows")

    def class_names(self) -> tuple[str, ...] | None:
        """The names of the labels in their order, where the training file is Parquet and has them."""
        if suffixes(self.paths["train"])[0] != ".parquet":
            return None
        return read_class_names(self.paths["train"], self.columns("train"))


def check_own_file(path: Path) -> None:
    """Raises a UserError if `path` is no file that can be read, or of no format that is."""
    check_table(path)
    open_input(path).close()


def make_row(where: str, columns: Sequence[str], values: Sequence[Any], may_be_empty: bool = False) -> Row:
    """A Row of the texts in `columns`, followed in `values` by the label.

    Raises:
        UserError: a text is no text, or is empty.
    """
    for column, value in zip(columns, values[:-1], strict=True):
        if not isinstance(value, str):
            kind = "missing" if value is None else f"of type {type(value).__name__}, not text"
            raise UserError(f"{where}: {column!r} is {kind}; fix the row or name another column")
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
    if isinstance(label, float) and not math.isfinite(label):
        raise not_a_label(row.where, label)
    hint = "set kind: number, or " if isinstance(label, float) else ""
    raise UserError(f"{row.where}: the label {brief(label)} is no class; {hint}give a word or a whole number")


def not_a_label(where: str, label: Any) -> UserError:
    """The error for NaN and infinities, which no kind of task can learn."""
    return UserError(
        f"{where}: the label {brief(label)} is no number that can be learned and no class; fill it in or drop the row"
    )


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
        if word not in found and (problem := text_problem(word)):
            raise UserError(f"{row.where}: the label {problem}; fix the row, or name another column with --own.label")
        found.setdefault(word, row.where)
    if len(found) < 2:
        raise UserError(
            f"the training file holds {len(found)} label(s) ({brief(', '.join(found), str)}); a task needs two or more"
        )
    numbers = [_number(word) for word in found]
    if None not in numbers:
        if bad := [word for word, number in zip(found, numbers, strict=True) if not math.isfinite(number)]:
            raise not_a_label(found[bad[0]], bad[0])  # a gap among numbers, not a word
        if all(number.is_integer() for number in numbers):
            return tuple(sorted(found, key=lambda word: (float(word), word)))
        word = next(word for word in found if not float(word).is_integer())
        raise UserError(f"{found[word]}: the label {brief(word)} is a number, no class; set kind: number")
    return tuple(sorted(found))


def _number(word: str) -> float | None:
    try:
        return number_of(word)
    except ValueError:
        return None
