"""Options of `fastbert audit`."""

import importlib.util
from dataclasses import dataclass, field
from typing import Annotated

from fastbert.config import BOOKKEEPING, MACHINE, convert_text
from fastbert.data.sources import check_source
from fastbert.downloads import FROM_HUB
from fastbert.errors import OptionError, UserError, brief
from fastbert.finetuning.glue import check_glue_folder
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.tasks import check_glue_options, check_task, custom_task, task_names
from fastbert.hub.folders import check_model_folder
from fastbert.lists import words
from fastbert.ranges import Count, Positive, Range, Seed, check_values
from fastbert.training.options import TrainingMachineOptions

KINDS = ("classes", "number")
"""Kinds of tasks that can be audited."""


@dataclass(frozen=True)
class AuditOptions:
    """Find the labels of a task that are likely wrong, duplicates, and the worth of more labels.

    Every example of train and dev is scored by a model that was not trained on it or on a copy of it: the examples are
    divided into folds by a hash of the text, and an encoder is fine-tuned on all folds but one, for each of them.
    Confident learning (arXiv 1911.00068) decides which labels are likely wrong."""

    task: str | None = field(default=None, metadata=BOOKKEEPING)
    """A GLUE task or the YAML file of a custom task, of kind classes or number."""
    model: str | None = field(default=None, metadata={**BOOKKEEPING, **FROM_HUB})
    """Pretrained model, as for fastbert finetune: a run, a checkpoint, an export, or a Hugging Face model, as a folder
    or as owner/name[@revision] on the hub."""
    out: str | None = field(default=None, metadata=BOOKKEEPING)
    """Folder for audit.jsonl (a line for each example), report.html, report.md, audit.json and the folds. The same
    command resumes an interrupted audit."""
    glue_dir: str | None = field(default=None, metadata=BOOKKEEPING)
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""
    glue_subset: bool = field(default=False, metadata=BOOKKEEPING)
    """Accept GLUE files with fewer rows than the official number."""

    folds: Annotated[int, Range(2, 100)] = 5
    """Number of folds; each label needs at least this number of different texts."""
    train_fraction: str = field(default="0.125,0.25,0.5,1.0", metadata=BOOKKEEPING)
    """Fractions of the training examples of each fold to train on as well, for the learning curve; each contains the
    smaller ones. 1.0 alone: no learning curve, in about half the time."""
    flip: Annotated[float, Range(0, 0.5)] = 0.0
    """Measure the audit: this fraction of the labels, selected by a hash, is replaced by other ones, and the report
    states how many of them are found. Only for kind classes."""
    annotators: str | None = field(default=None, metadata=BOOKKEEPING)
    """Comma-separated columns of the task's files with the label of each annotator, for Cohen's and Fleiss' kappa. A
    cell may be empty."""
    pretraining_text: str | None = field(default=None, metadata=BOOKKEEPING)
    """Text that the model was pretrained on, a source of `prepare`: counts the examples that occur in it."""
    near_duplicates: bool = field(default=True, metadata=BOOKKEEPING)
    """Find texts that are nearly equal (MinHash; needs the package datasketch)."""
    top: Count = field(default=50, metadata=BOOKKEEPING)
    """Number of suspicious labels, duplicates and disagreements in the report."""

    epochs: Count | None = None
    """Passes over the training examples (default: by task, as in finetune). The last epoch is used; none is
    selected."""
    batch_size: Count = 32
    """Examples per optimizer step."""
    max_length: Annotated[int, Range(8, 2**20)] | None = None
    """Maximum input length in tokens (default: the model's positions)."""
    learning_rate: Positive | None = None
    """Peak learning rate (default: by task, as in finetune)."""
    seed: Seed = 0
    """Random seed for the folds, flipped labels, the head's initialization, the order of examples and dropout."""
    machine: TrainingMachineOptions = field(default_factory=TrainingMachineOptions, metadata=MACHINE)

    def __post_init__(self) -> None:
        check_values(self)
        self.fractions()

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that model and task exist, and that the options fit the kind of the task.

        Raises:
            UserError: they do not exist, a required option is missing, or a package is.
        """
        if self.model is not None:  # an error in a given option is reported before a missing one
            check_model_folder(self.model)
        for name in ("task", "model", "out"):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is missing; see fastbert audit --help")
        if task_names(self.task) is not None:
            raise UserError(
                f"--task {brief(self.task, str)} is several tasks, and audit reads one; give each by itself"
            )
        check_task(self.task, None)
        declared = custom_task(self.task, None)
        if declared is not None:
            check_kind(self.task, declared[0].kind)
        self.annotator_names(declared is not None)
        check_glue_folder(self.glue_dir)
        check_glue_options([self.task], self.glue_dir, self.glue_subset)
        if self.pretraining_text is not None:
            check_source(self.pretraining_text)
        if self.near_duplicates and importlib.util.find_spec("datasketch") is None:
            raise UserError(
                "near duplicates need the package datasketch: pip install datasketch, or leave them out with "
                "--no-near-duplicates"
            )

    def annotator_names(self, custom: bool = True) -> tuple[str, ...]:
        """The columns in --annotators.

        Args:
            custom: False for a GLUE task, whose files have no such columns.

        Raises:
            UserError: there is one column, one is given twice, or the task is GLUE's.
        """
        if self.annotators is None:
            return ()
        names = tuple(words(self.annotators))
        if not custom:
            raise UserError(
                f"--annotators names columns of a custom task, and {self.task} is a GLUE task; leave it out"
            )
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(f"--annotators must be two or more different columns, not {brief(self.annotators)}")
        return names

    def fractions(self) -> list[float]:
        """The values of `train_fraction` in descending order.

        Raises:
            OptionError: a value is not a number, is outside (0, 1], is repeated, or 1.0 is missing.
        """
        try:
            fractions = [convert_text(part.strip(), float) for part in self.train_fraction.split(",")]
        except ValueError:
            fractions = []
        if (
            not all(0.0 < one <= 1.0 for one in fractions)
            or len(set(fractions)) < len(fractions)
            or 1.0 not in fractions
        ):
            problem = f"must be different fractions above 0, with 1.0 among them, not {brief(self.train_fraction)}"
            raise OptionError(self, "train_fraction", problem)
        return sorted(fractions, reverse=True)

    def tuning(self) -> FinetuneOptions:
        """The options of each training as those of a fine-tuning."""
        return FinetuneOptions(
            model=self.model,
            task=self.task,
            epochs=self.epochs,
            batch_size=self.batch_size,
            max_length=self.max_length,
            learning_rate=self.learning_rate,
            machine=self.machine,
        )


def check_kind(task: str, kind: str) -> None:
    """Raises a UserError if tasks of this kind cannot be audited."""
    if kind not in KINDS:
        raise UserError(
            f"the task {task} has kind {kind}, and audit reads the kinds {' and '.join(KINDS)}; give another"
        )
