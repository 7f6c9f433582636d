"""Custom tasks: their options and files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbert.config import choice
from fastbert.data.columns import Columns
from fastbert.data.formats import TABLES, suffixes
from fastbert.data.parquet import check_parquet
from fastbert.data.tables import check_table, read_rows
from fastbert.errors import OptionError, UserError, brief
from fastbert.finetuning.kinds import KINDS
from fastbert.finetuning.rows import Row, make_row
from fastbert.finetuning.soft_labels import add_soft_label
from fastbert.finetuning.word_rows import check_word_file, is_conll, word_columns, word_rows
from fastbert.inputs import open_input, refuse_slash
from fastbert.ranges import check_values

TEXT, LABEL = "text", "label"
"""The usual columns."""


@dataclass(frozen=True)
class CustomTaskOptions:
    """A custom task, as YAML or as flags. Files are tables: .jsonl, .ndjson, .json (an array of objects), .csv, .tsv
    (read without quoting), all of these also as .gz, .xz or .zst, or .parquet. With kind tokens they are CoNLL columns
    (.conll, .conllu, .tsv, .txt, ...) or tables with lists."""

    name: str | None = None
    """Name of the task in results (default: the name of its YAML file)."""
    train: str | None = None
    """File of the training examples; a path is relative to the working directory, or else to the YAML file."""
    dev: str | None = None
    """File of the examples on which the best epoch is selected."""
    test: str | None = None
    """File of the examples to predict; their labels may be missing."""
    text: str | None = None
    """Column of the text, or of the first text of a pair (default: text). With kind tokens, a column of lists of words
    or of texts (usually tokens or text); in CoNLL files the number of the word column, in .conllu also its name
    (usually 1, form)."""
    pair: str | None = None
    """Column of the second text of a pair."""
    label: str | None = None
    """Column of the label (default: label). With kind multi-label, each cell is a list of labels, which may be empty,
    or a text with ; between the labels, as in CSV and TSV; an empty cell is an empty list. With kind tokens, a column
    of lists of tags or spans (usually tags or spans); in CoNLL files the number or name of the tag column (usually the
    last, upos)."""
    soft: str | None = None
    """Column of soft labels, which train uses instead of the labels, whose column may then be missing in train: a list
    with the probability of each label in the order of `labels`, or an object label -> probability (missing labels have
    0); for kind number a number. In CSV and TSV, cells are JSON. Dev and test need no such column."""
    weight: str | None = None
    """Column of the weights of the training examples in the loss, 0 or more; they are divided by their mean. Dev and
    test need no such column."""
    kind: str = choice("classes", KINDS, "kind of labels")
    """Kind of labels: for each text, one of several classes, a number, or any number of labels (multi-label); for each
    word, a tag (tokens)."""
    labels: str | None = None
    """Comma-separated label names in id order, in double quotes if one contains a comma (default: the labels in train,
    sorted; for Parquet with ClassLabel names, these in order). With two labels, the second is the positive class of F1,
    AUC and pairwise accuracy."""
    metrics: str | None = None
    """Comma-separated names of metrics; the first chooses the best epoch (default: accuracy; for numbers
    pearson, spearman; for several labels micro_f1, macro_f1, subset_accuracy; for entities entity_f1,
    entity_precision, entity_recall, accuracy)."""
    symmetric: bool = False
    """The order of the two texts has no meaning, so --symmetric may read both orders."""

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("labels", "metrics"):
            value = getattr(self, name)
            if value is not None and not all(word.strip() for word in value.split(",")):
                raise OptionError(self, name, f"must be names with a comma between them, not {brief(value)}")

    def check(self) -> None:
        """Checks that the options are consistent. The constructor does not, since flags may describe only part of a
        task.

        Raises:
            UserError: they are not.
        """
        if self.symmetric and self.pair is None:
            raise UserError("symmetric is for pairs; name the column of the second text with pair")
        if self.labels is not None and not KINDS[self.kind].min_labels:
            raise UserError(f"labels are given, but kind is {self.kind}; drop labels or set kind: classes")
        if self.pair is not None and KINDS[self.kind].labels_words:
            raise UserError(f"kind {self.kind} labels the words of one text; drop pair")
        text, label = self.text or TEXT, self.label or LABEL
        for name, column in (("pair", self.pair), ("label", label)):
            if column == text:
                raise UserError(f"text and {name} are both the column {column!r}; name two columns")
        if self.pair is not None and self.pair == label:
            raise UserError(f"pair and label are both the column {self.pair!r}; name two columns")
        self.check_soft({"text": text, "pair": self.pair, "label": label})

    def check_soft(self, others: dict[str, str | None]) -> None:
        """Checks the columns of soft labels and weights; `others` are the columns of the other options."""
        for name in ("soft", "weight"):
            column = getattr(self, name)
            if column is None:
                continue
            if KINDS[self.kind].labels_words or (name == "soft" and self.kind == "multi-label"):
                raise UserError(f"{name} does not fit kind {self.kind}; drop it")
            if used_by := [other for other, used in others.items() if used == column]:
                raise UserError(f"{name} and {used_by[0]} are both the column {column!r}; name two columns")
            others = others | {name: column}
        if self.soft is not None and KINDS[self.kind].min_labels and self.labels is None:
            raise UserError("soft needs labels: the names of the labels in the order of the probabilities")


class CustomSource:
    """The files of a custom task; relative paths are searched in the working directory, then in `folder`.

    Args:
        further: columns that slices read.
    """

    def __init__(self, options: CustomTaskOptions, folder: Path | None = None, further: Sequence[str] = ()) -> None:
        options.check()
        self.options, self.further = options, tuple(further)
        if further and KINDS[options.kind].labels_words:
            raise UserError(
                f"a slice reads the column {brief(further[0])}, but kind {options.kind} has no further columns; give "
                "the slice another condition"
            )
        self.paths: dict[str, Path] = {}
        for split in ("train", "dev", "test"):
            if name := getattr(options, split):
                refuse_slash(name)
                path = Path(name)
                inside = folder / path if folder is not None else path
                self.paths[split] = inside if inside.exists() and not path.exists() else path
                _check_format(self.paths[split], KINDS[options.kind].labels_words, split == "test")
        if not self.paths:
            raise UserError("a custom task needs files: name train and dev (and test, if there is one)")

    def columns(self, split: str) -> Columns:
        """The columns of a split; the label column may be missing in test, and in train with soft labels."""
        options = self.options
        text = options.text or TEXT
        others = tuple(name for name in (options.soft, options.weight) if name is not None and split == "train")
        others += self.further
        return Columns(
            (text,) if options.pair is None else (text, options.pair),
            options.label or LABEL,
            label_may_lack=split == "test" or (split == "train" and options.soft is not None),
            remedy="choose the columns with text, pair and label (--custom.text, ...)"
            + (" and those of the slices" if self.further else ""),
            class_names=True,
            others=others,
        )

    def rows(self, split: str, warnings: list[str]) -> Iterator[Row]:
        """The rows of a split.

        Raises:
            UserError: a file or column is missing, a text is empty, or a file is binary; the message names file and
                line.
        """
        options = self.options
        if KINDS[options.kind].labels_words:
            yield from word_rows(self.paths[split], options.text, options.label, may_lack_labels=split == "test")
            return
        columns = self.columns(split)
        end = len(columns.names) - len(columns.others)
        for _, where, values in read_rows(self.paths[split], columns):
            row = make_row(where, columns.texts, values[:end])
            if self.further:
                row = row._replace(cells=dict(zip(self.further, values[-len(self.further) :], strict=True)))
            soft = len(columns.others) > len(self.further)
            yield add_soft_label(row, options.soft, options.weight, values[end:]) if soft else row

    def check_rows(self, split: str) -> None:
        """Reads the first row of a split.

        Raises:
            UserError: there is none, or it is invalid.
        """
        if next(self.rows(split, []), None) is None:
            raise UserError(f"{self.paths[split]} has no rows; give a file with rows")

    def class_names(self) -> tuple[str, ...] | None:
        """Label names in id order if the training file is Parquet and has them, otherwise None."""
        path, options = self.paths["train"], self.options
        if suffixes(path)[0] != ".parquet":
            return None
        words = KINDS[options.kind].labels_words
        return check_parquet(path, word_columns(path, options.text, options.label) if words else self.columns("train"))


def check_custom_file(path: Path, kind: str | None) -> None:
    """Raises a UserError if `path` cannot be read, or has a format that the kind (None if unknown) does not read."""
    _check_format(path, KINDS[kind].labels_words if kind is not None else is_conll(path), may_lack_labels=True)
    open_input(path).close()


def _check_format(path: Path, labels_words: bool, may_lack_labels: bool) -> None:
    if labels_words:
        check_word_file(path, may_lack_labels)
    elif is_conll(path) and suffixes(path)[0] not in (*TABLES, ".txt"):
        raise UserError(
            f"{path}: columns of words and tags are read with kind tokens (--custom.kind); for other kinds give one of "
            f"{', '.join(TABLES)}"
        )
    else:
        check_table(path)
