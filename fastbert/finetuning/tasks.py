"""Tasks: examples with a text or a pair and a label, from GLUE or from custom files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.config import from_dict
from fastbert.errors import UserError, brief, choose, nearest
from fastbert.finetuning.custom import CustomSource, CustomTaskOptions, check_custom_file
from fastbert.finetuning.glue import GLUE, GlueSource, plain
from fastbert.finetuning.kinds import KINDS
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.metrics import METRICS
from fastbert.finetuning.rows import Example, TaskSource
from fastbert.finetuning.slices import Slice, columns_of, load_slices, split_off
from fastbert.finetuning.table import COLUMNS
from fastbert.lists import paths, words

ALL = "glue"  # task name for all tasks of the GLUE table


@dataclass(frozen=True)
class Task:
    """A task: labels, metrics and splits."""

    name: str
    kind: TaskKind
    """Kind of labels, with the labels of the task."""
    is_pair: bool
    metrics: tuple[str, ...]
    """Names in `metrics.METRICS`; the first selects the best epoch."""
    symmetric: bool
    """The two texts of a pair may be swapped."""
    splits: dict[str, str]
    """train, dev..., test... -> file or origin of each."""
    source: TaskSource = field(repr=False)
    slices: tuple[Slice, ...] = ()
    """Subsets of dev on which metrics are reported."""
    warnings: list[str] = field(default_factory=list, repr=False, compare=False)
    """Warnings from reading the files; `examples` appends to them."""

    def __post_init__(self) -> None:
        self.kind.check_metrics(self.metrics)

    @property
    def dev_splits(self) -> tuple[str, ...]:
        """("dev",), for MNLI ("dev_matched", "dev_mismatched"), for AX none."""
        return tuple(split for split in self.splits if split.startswith("dev"))

    def examples(self, split: str) -> list[Example]:
        """All examples of a split, in the order of its file.

        Raises:
            UserError: there is no such split; a file or column is missing; a text is empty; a label is unknown, of the
                wrong kind, or missing outside of test; a GLUE file has too few rows.
        """
        choose(f"split of {self.name}", split, self.splits)
        labelled = not split.startswith("test")
        warnings: list[str] = []
        examples = []
        for row in self.source.rows(split, warnings):
            label, soft_label = self.kind.read(row), self.kind.read_soft(row)
            if label is None and soft_label is not None:
                label = self.kind.harden(soft_label)
            if label is None and labelled:
                raise UserError(f"{row.where} has no label; {split} needs one in every row{self.kind.missing_hint}")
            examples.append(
                Example(len(examples), row.text, row.pair, label, row.words, soft_label, row.weight, row.cells)
            )
        if not examples:
            raise UserError(f"{self.splits[split]} holds no example; give a file with rows")
        self.warnings.extend(warning for warning in warnings if warning not in self.warnings)
        return examples

    def measure(self, scores: np.ndarray, labels: Sequence[Any]) -> dict[str, float]:
        """All metrics of the task.

        Args:
            scores: [U, ...], from `TaskKind.scores`: [N, L] probabilities of the L labels, [N] numbers, ...
            labels: the labels of N examples.

        Raises:
            UserError: there is no example, a label is missing, a score is not finite, or a metric is undefined (AUC and
                pairwise accuracy with a single label).
        """
        scores = np.asarray(scores, dtype=np.float64)
        missing = sum(label is None for label in labels)
        if missing:
            raise UserError(
                f"task {self.name}: {missing} of {len(labels)} examples have no label, so they can be predicted but "
                "not scored; score a split with labels (GLUE does not publish those of its test splits)"
            )
        if len(labels) == 0:
            raise UserError(f"task {self.name}: there is no example to score; give a split with examples")
        if scores.shape != (expected := (len(self.kind.targets(labels)), *self.kind.score_shape())):
            raise ValueError(f"scores of shape {scores.shape} for labels and task that need {expected}")
        if not np.isfinite(scores).all():
            raise UserError(
                f"task {self.name}: the model's scores are not finite, training diverged; lower the learning rate"
            )
        return {name: self.measured(name, scores, labels) for name in self.metrics}

    def measured(self, metric: str, scores: np.ndarray, labels: Sequence[Any]) -> float:
        """One metric, see `measure`."""
        return METRICS[metric](*self.kind.compared(metric, scores, labels))

    def check_scorable(self, labels: Sequence[Any]) -> None:
        """Checks, before any work, that the metrics of a split with these labels are defined.

        Raises:
            UserError: they are not, see `measure`.
        """
        self.measure(self.kind.ideal_scores(labels), labels)


def task_names(task: str | None) -> list[str] | None:
    """Names of the tasks in --task if there are several, or None if there is one."""
    if task == ALL:
        return list(COLUMNS)
    if task is None or "," not in task or Path(task).is_file():
        return None
    return paths(task, os.path.isfile)


def check_task(name: str, custom: CustomTaskOptions) -> None:
    """Checks that a task is known, or that its YAML file and data files exist, without reading the data.

    Raises:
        UserError: it is unknown, or a file does not exist.
    """
    if (declared := custom_task(name, custom)) is not None:
        for path in CustomSource(*declared[:2]).paths.values():
            check_custom_file(path, declared[0].kind)


def custom_task(
    name: str, custom: CustomTaskOptions | None
) -> tuple[CustomTaskOptions, Path | None, tuple[Slice, ...]] | None:
    """Options of the custom task `name` (a YAML file, or any name with the options `custom`), the folder of the file,
    and its slices; None for a GLUE task. Options in `custom` that differ from the defaults override the file.

    Raises:
        UserError: there is no such task, or a GLUE task has options.
    """
    chosen = given_options(custom)
    if is_yaml(name):
        values, where, slices = split_off(name)
        return replace(from_dict(CustomTaskOptions, values, where), **chosen), Path(name).parent, slices
    if is_glue(name):
        if chosen:
            raise UserError(f"{name} is a GLUE task and takes no {', '.join(chosen)}; rename the custom task")
        return None
    if not chosen:
        advice = "for a custom task give its YAML file, or --custom.train and --custom.dev"
        raise UserError(f"unknown task {name!r}; {nearest(name, GLUE)}; {advice}")
    return custom, None, ()


def is_yaml(name: str) -> bool:
    return Path(name).suffix.lower() in (".yaml", ".yml")


def is_glue(name: str) -> bool:
    """True if `name` is a GLUE task."""
    return plain(name) in GLUE


def check_glue_options(tasks: Sequence[str], glue_dir: str | None, glue_subset: bool, dashes: str = "--") -> None:
    """Checks that options for GLUE are given only with a GLUE task.

    Args:
        dashes: prefix of option names in the message; empty for a YAML file.

    Raises:
        UserError: an option for GLUE is given, and none of the tasks is a GLUE task.
    """
    if not any(map(is_glue, tasks)) and (glue_dir is not None or glue_subset):
        name = "glue_dir" if glue_dir is not None else "glue_subset"
        option = f"{dashes}{name.replace('_', '-')}" if dashes else name
        who = " and ".join(brief(task, str) for task in tasks)
        none = (
            f"{who} {'are not GLUE tasks' if len(tasks) > 1 else 'is not a GLUE task'}" if tasks else "there is no task"
        )
        raise UserError(f"{option} is for GLUE, and {none}; leave it out")


def given_options(custom: CustomTaskOptions | None) -> dict[str, Any]:
    """Options that differ from the defaults."""
    values = {} if custom is None else {field.name: getattr(custom, field.name) for field in fields(custom)}
    return {name: value for name, value in values.items() if value != getattr(CustomTaskOptions, name)}


def open_task(
    name_or_yaml: str,
    *,
    glue_dir: str | None = None,
    custom: CustomTaskOptions | None = None,
    glue_subset: bool = False,
    slices: str | None = None,
) -> Task:
    """Opens a task.

    Args:
        name_or_yaml: a GLUE task, the YAML file of a custom task, or any name for the custom task in `custom`.
        glue_dir: folder of the official archive, or of the Parquet files of nyu-mll/glue; without one, GLUE is read
            through `datasets`.
        custom: the custom task; options that differ from the defaults override a YAML file.
        glue_subset: accept GLUE files with fewer rows than the official number.
        slices: YAML file with slices, for a task whose own file has none.

    Raises:
        UserError: no such task, file, folder or column; errors in the training file, if labels are learned from it.
    """
    declared, given = custom_task(name_or_yaml, custom), () if slices is None else load_slices(slices)
    if declared is None:
        if columns := columns_of(given):
            raise UserError(
                f"{slices}: a slice reads the column {brief(columns[0])}, but GLUE tasks have no further columns; give "
                "the slice another condition"
            )
        return replace(_glue_task(plain(name_or_yaml), glue_dir, glue_subset), slices=given)
    if given and declared[2]:
        raise UserError(f"{name_or_yaml} has slices of its own; leave out --slices {slices}")
    own = (*declared[:2], declared[2] or given)
    return _custom_task(Path(name_or_yaml).stem if is_yaml(name_or_yaml) else name_or_yaml, *own)


def _glue_task(name: str, folder: str | None, subset: bool) -> Task:
    source, task = GlueSource(name, folder, subset), GLUE[name]
    return Task(
        name=name,
        kind=task.kind,
        is_pair=len(task.hub_columns) == 2,
        metrics=task.metrics,
        symmetric=task.symmetric,
        splits=source.origins(),
        source=source,
    )


def _custom_task(name: str, options: CustomTaskOptions, folder: Path | None, slices: tuple[Slice, ...]) -> Task:
    source = CustomSource(options, folder, columns_of(slices))
    kind = KINDS[options.kind].declared(name, source)
    task = Task(
        name=options.name or name,
        kind=kind,
        is_pair=options.pair is not None,
        metrics=tuple(words(options.metrics or "")) or kind.default_metrics,
        symmetric=options.symmetric,
        splits={split: str(path) for split, path in source.paths.items()},
        source=source,
        slices=slices,
    )
    for split in source.paths:
        source.check_rows(split)
    return task
