"""GLUE's tasks: their files in the official archive and in the layout of `datasets`, and the rows of each split.

Labels are in the order of `datasets` (nyu-mll/glue), whose files contain label ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from fastbert.data.columns import Columns
from fastbert.data.formats import opened
from fastbert.data.parquet import arrow_rows, check_schema
from fastbert.data.tables import pick, read_rows, tsv_fields
from fastbert.errors import UserError
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.kinds.number import Number
from fastbert.finetuning.rows import Row, make_row

HUB = "nyu-mll/glue"
"""Dataset that is read through `datasets` if no folder is given."""
BINARY = Classes(("0", "1"))
TWO_WAY = Classes(("entailment", "not_entailment"))
THREE_WAY = Classes(("entailment", "neutral", "contradiction"))


@dataclass(frozen=True)
class GlueTask:
    """Constants of one task."""

    title: str
    """Name in papers and name of the official folder."""
    kind: TaskKind
    metrics: tuple[str, ...]
    columns: tuple[str, ...]
    """Columns of the official files: the text or both texts, and the label."""
    hub_columns: tuple[str, ...]
    """Columns of the texts in `datasets`; the column of the label is `label`."""
    rows: dict[str, int]
    """Official number of rows of each split."""
    majority: str
    """Placeholder: the most frequent label of train (for AX by the published fractions), or the mean score."""
    folders: tuple[str, ...] = ()
    """Other names of the folder."""
    headers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Columns of the splits whose official files have no header."""
    symmetric: bool = False
    ragged: bool = False
    """Official files of this task have incomplete rows, or could not be inspected: rows with missing fields are skipped
    and counted, as in the readers that gave the official counts, and an empty text is accepted."""


def _sizes(train: int, dev: int, test: int) -> dict[str, int]:
    return {"train": train, "dev": dev, "test": test}


_SENTENCES = ("sentence1", "sentence2")
_NO_HEADER = ("source", "label", "note", "sentence")
_MNLI_ROWS = {
    "train": 392_702,
    "dev_matched": 9_815,
    "dev_mismatched": 9_832,
    "test_matched": 9_796,
    "test_mismatched": 9_847,
}

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(
        "CoLA",
        BINARY,
        ("matthews",),
        columns=("sentence", "label"),
        hub_columns=("sentence",),
        rows=_sizes(8_551, 1_043, 1_063),
        majority="1",
        headers={"train": _NO_HEADER, "dev": _NO_HEADER},
    ),
    "sst2": GlueTask(
        "SST-2",
        BINARY,
        ("accuracy",),
        columns=("sentence", "label"),
        hub_columns=("sentence",),
        rows=_sizes(67_349, 872, 1_821),
        majority="1",
        folders=("sst",),
    ),
    "mrpc": GlueTask(
        "MRPC",
        BINARY,
        ("accuracy", "f1"),
        columns=("#1 String", "#2 String", "Quality"),
        hub_columns=_SENTENCES,
        rows=_sizes(3_668, 408, 1_725),
        majority="1",
        symmetric=True,
    ),
    "stsb": GlueTask(
        "STS-B",
        Number(),
        ("pearson", "spearman"),
        columns=(*_SENTENCES, "score"),
        hub_columns=_SENTENCES,
        rows=_sizes(5_749, 1_500, 1_379),
        majority="2.701",
        folders=("sts",),
        symmetric=True,
    ),
    "qqp": GlueTask(
        "QQP",
        BINARY,
        ("accuracy", "f1"),
        columns=("question1", "question2", "is_duplicate"),
        hub_columns=("question1", "question2"),
        rows=_sizes(363_846, 40_430, 390_965),
        majority="0",
        symmetric=True,
        ragged=True,
    ),
    "mnli": GlueTask(
        "MNLI",
        THREE_WAY,
        ("accuracy",),
        columns=(*_SENTENCES, "gold_label"),
        hub_columns=("premise", "hypothesis"),
        rows=_MNLI_ROWS,
        majority="contradiction",
        ragged=True,
    ),
    "qnli": GlueTask(
        "QNLI",
        TWO_WAY,
        ("accuracy",),
        columns=("question", "sentence", "label"),
        hub_columns=("question", "sentence"),
        rows=_sizes(104_743, 5_463, 5_463),
        majority="not_entailment",
        folders=("qnliv2",),
    ),
    "rte": GlueTask(
        "RTE",
        TWO_WAY,
        ("accuracy",),
        columns=(*_SENTENCES, "label"),
        hub_columns=_SENTENCES,
        rows=_sizes(2_490, 277, 3_000),
        majority="entailment",
    ),
    "wnli": GlueTask(
        "WNLI",
        BINARY,
        ("accuracy",),
        columns=(*_SENTENCES, "label"),
        hub_columns=_SENTENCES,
        rows=_sizes(635, 71, 146),
        majority="0",
    ),
    "ax": GlueTask(
        "AX",
        THREE_WAY,
        ("matthews",),
        columns=(*_SENTENCES, "label"),
        hub_columns=("premise", "hypothesis"),
        rows={"test": 1_104},
        majority="entailment",
        folders=("diagnostic",),
    ),
}


def plain(name: str) -> str:
    """`name` in the spelling of the registry: SST-2, sst_2 and sst2 are the same."""
    return "".join(c for c in name.lower() if c.isalnum())


class GlueSource:
    """One task from a GLUE folder (official TSV, or the Parquet of `datasets`), or without a folder from `datasets`."""

    def __init__(self, name: str, folder: str | None, subset: bool) -> None:
        """
        Args:
            name: a key of `GLUE`.
            folder: contains a folder for each task.
            subset: accept fewer rows than the official number.

        Raises:
            UserError: the folder does not exist or has no folder for this task.
        """
        self.name, self.task, self.subset = name, GLUE[name], subset
        self.root = None if folder is None else Path(folder)
        self.folders = [] if self.root is None else self._task_folders(self.root)

    def _task_folders(self, root: Path) -> list[Path]:
        check_glue_folder(root)
        names = (self.name, *self.task.folders)
        folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and plain(folder.name) in names]
        if not folders:
            inside = ", ".join(sorted(path.name for path in root.iterdir())[:20]) or "nothing"
            near = [*(path for path in root.iterdir() if path.is_dir()), root.absolute().parent]
            found = [path for path in near if (path / self.task.title).is_dir()]
            remedy = f"did you mean --glue-dir {found[0]}?" if found else "fix --glue-dir"
            raise UserError(f"{root} has no folder {self.task.title}; it holds {inside}; {remedy}")
        return sorted(folders, key=lambda folder: names.index(plain(folder.name)))

    def origins(self) -> dict[str, str]:
        """Files of each split, even if missing; without a folder, the name on the hub."""
        return {split: ", ".join(str(path) for path in self._paths(split)) or HUB for split in self.task.rows}

    def has(self, split: str) -> bool:
        """True if the files of a split exist; always true for `datasets`."""
        return not self.folders or all(path.is_file() for path in self._paths(split))

    def _paths(self, split: str) -> list[Path]:
        for folder in self.folders:
            if (path := folder / self._official(split)).is_file():
                return [path]
            if paths := sorted(
                [*folder.glob(f"{_hub_split(split)}-*.parquet"), *folder.glob(f"{_hub_split(split)}.parquet")]
            ):
                return paths
        return [self.folders[0] / self._official(split)] if self.folders else []

    def _official(self, split: str) -> str:
        return "diagnostic.tsv" if self.name == "ax" else f"{split}.tsv"

    def rows(self, split: str, warnings: list[str]) -> Iterator[Row]:
        """The rows of a split, with labels as words or numbers (None in test); skipped rows are reported in `warnings`.

        Raises:
            UserError: a row is invalid (the message names file and line); or, at the end, there are fewer rows than the
                official number.
        """
        paths = self._paths(split)
        if not paths:
            found = self._hub_rows(split)
        elif paths[0].suffix == ".parquet":
            found = chain.from_iterable(self._parquet_rows(path, split) for path in paths)
        else:
            found = self._tsv_rows(paths[0], split, warnings)
        count, official = 0, self.task.rows[split]
        for row in found:
            count += 1
            yield row
        where = paths[0] if len(paths) == 1 else self.origins()[split]
        if count < official and not self.subset:
            raise UserError(
                f"{where} holds {count:,} usable rows, and {self.task.title}'s {split} has {official:,}; "
                "download it again, or accept a subset with --glue-subset"
            )
        if count > official:
            warnings.append(f"{where} holds {count:,} rows, more than the official {official:,}")

    def _tsv_rows(self, path: Path, split: str, warnings: list[str]) -> Iterator[Row]:
        task, labelled = self.task, not split.startswith("test")
        texts = task.columns[:-1]
        columns = Columns(texts, task.columns[-1] if labelled else None, remedy="fetch the file again")
        header, ragged = task.headers.get(split), task.ragged
        skipped = empty = 0
        with opened(path) as (_, stream):
            for line, values in pick(path, tsv_fields(stream, path), columns, header=header, ragged=ragged):
                if values is None or (ragged and labelled and not values[-1]):
                    if not labelled:  # a submission needs an answer for every row
                        raise UserError(f"{path}, line {line} lacks fields; fetch the file again")
                    skipped += 1
                    continue
                row = make_row(f"{path}, line {line}", texts, values if labelled else [*values, None], task.ragged)
                empty += not (row.text.strip() and (row.pair is None or row.pair.strip()))
                yield row
        if skipped:
            warnings.append(f"{path}: {skipped} rows lack fields and were skipped, as in the official counts")
        if empty:
            warnings.append(f"{path}: {empty} rows have an empty text and were retained, as in the official counts")

    def _parquet_rows(self, path: Path, split: str) -> Iterator[Row]:
        return self._numbered(split, ((where, cells) for _, where, cells in read_rows(path, self._hub_columns)))

    @property
    def _hub_columns(self) -> Columns:
        return Columns(self.task.hub_columns, "label", remedy=f"download the file from {HUB}")

    def _hub_rows(self, split: str) -> Iterator[Row]:
        import datasets

        try:
            table = datasets.load_dataset(HUB, self.name, split=_hub_split(split))
        except OSError as error:  # not found, no connection, offline
            raise UserError(
                f"{HUB} ({self.name}) could not be read through datasets: {error}; "
                "give a folder that holds GLUE with --glue-dir"
            ) from error
        where = f"{HUB} {self.name} {split}"
        check_schema(table.features.arrow_schema, self._hub_columns, where)
        batches = table.with_format("arrow").iter(batch_size=10_000)
        rows = arrow_rows(batches, table.column_names, self._hub_columns, where)
        return self._numbered(split, ((f"{where}, row {number}", cells) for number, cells in rows))

    def _numbered(self, split: str, rows: Iterator[tuple[str, list[Any]]]) -> Iterator[Row]:
        """Rows read through `datasets`, in which a label is an id (-1 in test)."""
        labels = self.task.kind.labels
        for here, values in rows:
            label = values[-1]
            if split.startswith("test"):
                label = None
            elif labels:
                if not isinstance(label, int) or not 0 <= label < len(labels):
                    raise UserError(
                        f"{here}: the label {label!r} is not a whole number from 0 to {len(labels) - 1}; "
                        f"download the file from {HUB}"
                    )
                label = labels[label]
            yield make_row(here, self.task.hub_columns, [*values[:-1], label], self.task.ragged)


def _hub_split(split: str) -> str:
    return split.replace("dev", "validation")


def check_glue_folder(folder: str | Path | None) -> None:
    """Raises a UserError if --glue-dir is not a folder."""
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"no GLUE folder {folder}; give the folder that holds CoLA, SST-2, ... with --glue-dir")
