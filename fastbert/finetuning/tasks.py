"""What is learned and predicted: examples with a text or a pair and a label, of GLUE or of one's own files."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from fastbert.config import load_yaml
from fastbert.errors import UserError, brief, choose, nearest
from fastbert.finetuning.glue import GLUE, GlueSource, plain
from fastbert.finetuning.metrics import check_metrics
from fastbert.finetuning.own import (
    OwnSource,
    OwnTaskOptions,
    Row,
    check_own_file,
    label_word,
    learn_labels,
    not_a_label,
)
from fastbert.finetuning.table import COLUMNS
from fastbert.lists import paths, words
from fastbert.ranges import number_of

ALL = "glue"  # as the name of a task: those of the table

__all__ = ["GLUE", "Example", "OwnTaskOptions", "Task", "open_task"]


@dataclass(frozen=True)
class Example:
    """One row of a split."""

    index: int
    """From 0, in the order of the file."""
    text: str
    pair: str | None
    label: int | float | None
    """Place in the task's labels, or a number; None where the split has none."""


class Source(Protocol):
    """Where the rows of a task come from."""

    def rows(self, split: str, notes: list[str]) -> Iterator[Row]:
        """The rows of a split; what the user should know of them goes to `notes`."""
        ...


@dataclass(frozen=True)
class Task:
    """A task: its labels and metrics, and the splits it can read."""

    name: str
    kind: str
    """"classes" or "number"."""
    labels: tuple[str, ...]
    """Label words in the order of their ids; empty for numbers."""
    is_pair: bool
    metrics: tuple[str, ...]
    """Names in `metrics.METRICS`; the first decides which epoch is best."""
    symmetric: bool
    """The two texts of a pair may change places."""
    splits: dict[str, str]
    """train, dev..., test... and where each comes from."""
    source: Source = field(repr=False)
    notes: list[str] = field(default_factory=list, repr=False, compare=False)
    """What reading has found that the user should know; `examples` appends."""

    def __post_init__(self) -> None:
        check_metrics(self.metrics, self.kind, self.labels)

    @property
    def dev_splits(self) -> tuple[str, ...]:
        """("dev",), for MNLI ("dev_matched", "dev_mismatched"), for AX none."""
        return tuple(split for split in self.splits if split.startswith("dev"))

    @property
    def test_splits(self) -> tuple[str, ...]:
        """("test",), for MNLI ("test_matched", "test_mismatched"); none where the task has none."""
        return tuple(split for split in self.splits if split.startswith("test"))

    def examples(self, split: str) -> list[Example]:
        """All examples of a split, in the order of its file.

        Raises:
            UserError: the task has no such split; a file or column is missing; a text is empty; a label is unknown,
                of the wrong kind, or missing outside of test; GLUE's row count is not reached.
        """
        choose(f"split of {self.name}", split, self.splits)
        ids = {word: place for place, word in enumerate(self.labels)}
        labelled = not split.startswith("test")
        notes: list[str] = []
        examples = []
        for row in self.source.rows(split, notes):
            label = _number(row) if self.kind == "number" else _class(row, ids)
            if label is None and labelled:
                raise UserError(f"{row.where} has no label; {split} needs one in every row")
            examples.append(Example(len(examples), row.text, row.pair, label))
        if not examples:
            raise UserError(f"{self.splits[split]} holds no example; give a file with rows")
        self.notes.extend(note for note in notes if note not in self.notes)
        return examples


def _class(row: Row, ids: dict[str, int]) -> int | None:
    word = label_word(row)
    if word is not None and word not in ids:
        raise UserError(f"{row.where}: unknown label {brief(word)}; {nearest(word, ids)}")
    return None if word is None else ids[word]


def _number(row: Row) -> float | None:
    label = row.label
    if label is None or (isinstance(label, str) and not label.strip()):
        return None
    try:
        number = None if isinstance(label, bool) else number_of(label) if isinstance(label, str) else float(label)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        number = None
    if number is None:
        hint = ", or set kind: classes" if isinstance(label, str | bool) else ""
        raise UserError(f"{row.where}: the label {brief(label)} is no number; fix it{hint}")
    if not math.isfinite(number):
        raise not_a_label(row.where, label)
    return number


def task_names(task: str | None) -> list[str] | None:
    """The several tasks that --task names, or None if it names one."""
    if task == ALL:
        return list(COLUMNS)
    if task is None or "," not in task or Path(task).is_file():
        return None
    return paths(task, os.path.isfile)


def check_task(name: str, own: OwnTaskOptions) -> None:
    """Checks that a task is known, or the YAML file and the files that declare it are there; reads none of them.

    Raises:
        UserError: they are not.
    """
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        source = OwnSource(declared(name, own), Path(name).parent)
    elif plain(name) in GLUE:
        _refuse_own(name, own)
        return
    elif own == OwnTaskOptions():
        raise UserError(f"unknown task {name!r}; {nearest(name, GLUE)}; for an own task give a YAML file or flags")
    else:
        source = OwnSource(own)
    for path in source.paths.values():
        check_own_file(path)


def is_glue(name: str) -> bool:
    """Whether --task `name` is one of GLUE's."""
    return plain(name) in GLUE


def check_glue_options(tasks: Sequence[str], glue_dir: str | None, glue_subset: bool, dashes: str = "--") -> None:
    """
    Args:
        dashes: what stands before the name of an option; none in a YAML file.

    Raises:
        UserError: an option of GLUE is given, and none of the tasks is one of GLUE's.
    """
    if not any(map(is_glue, tasks)) and (glue_dir is not None or glue_subset):
        name = "glue_dir" if glue_dir is not None else "glue_subset"
        option = f"{dashes}{name.replace('_', '-')}" if dashes else name
        who = " and ".join(brief(task, str) for task in tasks)
        none = f"{who} {'are no GLUE tasks' if len(tasks) > 1 else 'is no GLUE task'}" if tasks else "there is no task"
        raise UserError(f"{option} is for GLUE, and {none}; leave it out")


def _refuse_own(name: str, own: OwnTaskOptions | None) -> None:
    """Raises a UserError if options of a custom task are given for the GLUE task `name`."""
    if chosen := given_in(own):
        raise UserError(f"{name} is a GLUE task and takes no {', '.join(chosen)}; give the own task another name")


def declared(path: str, own: OwnTaskOptions) -> OwnTaskOptions:
    """The task in the YAML file `path`; what differs from the defaults in `own` wins."""
    return replace(load_yaml(OwnTaskOptions, path), **given_in(own))


def given_in(own: OwnTaskOptions | None) -> dict[str, Any]:
    """The options that differ from the defaults."""
    return (
        {} if own is None else {f.name: getattr(own, f.name) for f in fields(own) if getattr(own, f.name) != f.default}
    )


def open_task(
    name_or_yaml: str, *, glue_dir: str | None = None, own: OwnTaskOptions | None = None, glue_subset: bool = False
) -> Task:
    """The task of that name.

    Args:
        name_or_yaml: a GLUE task, the YAML file of an own task, or any name for the own task in `own`.
        glue_dir: folder of the official archive, or of the Parquet files of nyu-mll/glue; without one, GLUE is read
            through `datasets`.
        own: the own task; what differs from the defaults wins over a YAML file.
        glue_subset: GLUE files with fewer rows than the official ones are meant.

    Raises:
        UserError: no such task, file, folder or column; for learned labels also what is wrong in the training file.
    """
    chosen = given_in(own)
    if Path(name_or_yaml).suffix.lower() in (".yaml", ".yml"):
        path = Path(name_or_yaml)
        return _own_task(declared(path, own), path.stem, path.parent)
    if plain(name_or_yaml) in GLUE:
        _refuse_own(name_or_yaml, own)
        return _glue_task(plain(name_or_yaml), glue_dir, glue_subset)
    if not chosen:
        raise UserError(
            f"unknown task {name_or_yaml!r}; {nearest(name_or_yaml, GLUE)}; for an own task give a YAML file or flags"
        )
    return _own_task(OwnTaskOptions(**chosen), name_or_yaml, None)


def _glue_task(name: str, folder: str | None, subset: bool) -> Task:
    source, task = GlueSource(name, folder, subset), GLUE[name]
    return Task(
        name=name,
        kind="classes" if task.labels else "number",
        labels=task.labels,
        is_pair=len(task.hub_columns) == 2,
        metrics=task.metrics,
        symmetric=task.symmetric,
        splits=source.places(),
        source=source,
    )


def _own_task(options: OwnTaskOptions, name: str, folder: Path | None) -> Task:
    source = OwnSource(options, folder)
    labels: tuple[str, ...] = ()
    if options.kind == "classes":
        labels = tuple(words(options.labels or ""))
        if len(set(labels)) != len(labels) or len(labels) == 1:
            raise UserError(f"labels {options.labels!r}: give two or more different words, a comma between them")
        if not labels:
            if "train" not in source.paths:
                raise UserError(f"task {name}: without a train file to learn them from, give the labels")
            labels = source.class_names() or ()
        if not labels:
            source.check_rows("train")
            labels = learn_labels(source.rows("train", []))
    usual = ("accuracy",) if options.kind == "classes" else ("pearson", "spearman")
    task = Task(
        name=options.name or name,
        kind=options.kind,
        labels=labels,
        is_pair=options.pair is not None,
        metrics=tuple(words(options.metrics or "")) or usual,
        symmetric=options.symmetric,
        splits={split: str(path) for split, path in source.paths.items()},
        source=source,
    )
    for split in source.paths:
        source.check_rows(split)
    return task
