"""Kind of a task: what is predicted for each example, and everything that depends on it: labels in files, head, loss,
scores, metrics, predictions as JSON, and the class of the Hugging Face export.

Tasks are opened and their labels checked before torch is imported, so kinds import torch in functions.

Shapes: B examples of a batch, T tokens, D width, L outputs, N examples of a split, U units of a split. A unit is what
is scored: an example or, where words have labels, a word."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastbert.errors import UserError, brief, choose
from fastbert.finetuning.custom import CustomSource
from fastbert.finetuning.metrics import METRICS
from fastbert.finetuning.rows import Example, Row
from fastbert.lists import words
from fastbert.ranges import text_problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastbert.data.foreign_tokenizer import AnyTokenizer
    from fastbert.finetuning.batches import EncodedSplit


@dataclass(frozen=True)
class TaskKind(ABC):
    """A kind with the labels of one task."""

    labels: tuple[str, ...] = ()
    """Label names in id order; empty for kinds without a set of labels."""

    name: ClassVar[str]
    """Name in options and task.json, a key of `KINDS`."""
    plural: ClassVar[str]
    """Plural noun for the labels, in messages."""
    min_labels: ClassVar[int]
    """Minimum number of labels; 0 for kinds without a set of labels."""
    metrics: ClassVar[tuple[str, ...]]
    """Names in `METRICS` that suit this kind."""
    default_metrics: ClassVar[tuple[str, ...]]
    """Default metrics of a custom task."""
    architecture: ClassVar[str]
    """Suffix of the name of transformers' class for the export, after Bert or FastBert."""
    problem_type: ClassVar[str | None]
    """`problem_type` in the export's config.json; None for none."""
    pipeline: ClassVar[str]
    """Hugging Face's pipeline tag of the export."""
    labels_words: ClassVar[bool] = False
    """True if each word of a text has a label, false if the text has one."""
    missing_hint: ClassVar[str] = ""
    """End of the error message for a row without a label."""

    @property
    def id2label(self) -> dict[str, str]:
        """Output -> label name, for the export's config.json."""
        return {str(output): label for output, label in enumerate(self.labels)}

    @cached_property
    def ids(self) -> dict[str, int]:
        """Label name -> id."""
        return {label: number for number, label in enumerate(self.labels)}

    # --- files

    @classmethod
    @abstractmethod
    def declared(cls, task: str, source: CustomSource) -> "TaskKind":
        """The kind of the custom task `task`, with labels from its options or its training file.

        Raises:
            UserError: there are no labels, or too few.
        """

    @abstractmethod
    def read(self, row: Row) -> Any:
        """The label of a row, for `Example.label`; None if there is none.

        Raises:
            UserError: the label is invalid.
        """

    def read_soft(self, row: Row) -> tuple[float, ...] | float | None:
        """The soft label of a row, for `Example.soft_label`; None if there is none. Kinds that can be trained on soft
        labels from files override it.

        Raises:
            UserError: it is invalid.
        """
        return None

    def harden(self, soft_label: Any) -> Any:
        """The label of a training example that has only a soft label, for files and hashes. Kinds that override
        `read_soft` override it too."""
        raise NotImplementedError(self.name)  # a kind without soft labels has nothing to call it for

    @abstractmethod
    def file_label(self, example: Example) -> Any:
        """The label of an example, as written to files."""

    def settings(self) -> dict[str, Any]:
        """Settings for task.json in addition to the labels."""
        return {}

    def card(self) -> str:
        """Lines of the model card about the settings; empty for none."""
        return ""

    @classmethod
    def restored(cls, labels: tuple[str, ...], settings: dict[str, Any], where: str) -> "TaskKind":
        """Restores the kind that was saved with these labels and settings.

        Raises:
            UserError: the settings in the file `where` do not fit.
        """
        if settings:
            raise UserError(f"{where} is damaged: the kind {cls.name} has no settings")
        return cls(labels)

    # --- training

    def encode(self, examples: Sequence[Example], vocabulary: "AnyTokenizer", max_length: int) -> "EncodedSplit":
        """Encodes examples as token ids, at most `max_length` in each row."""
        from fastbert.finetuning.batches import encode

        return encode(examples, vocabulary, max_length, self.targets)

    @abstractmethod
    def new_head(self, width: int, dropout: float) -> "nn.Module":
        """A head for the encoder, such as `task_heads.PooledHead`."""

    @abstractmethod
    def targets(self, labels: Sequence[Any]) -> np.ndarray:
        """Training targets, [U] or [U, ...]."""

    @abstractmethod
    def losses(self, logits: "Tensor", targets: "Tensor") -> "Tensor":
        """Loss of each row, [B], the sum over its units.

        Args:
            logits: output of the head, in float32 or float64.
            targets: rows of `targets`, or soft labels: the ideal values of `scores`.
        """

    # --- scores

    @abstractmethod
    def scores(self, logits: "Tensor") -> "Tensor":
        """Predictions that can be averaged and measured, float64 [B, ...], or [B, T, ...] if words have labels."""

    @abstractmethod
    def score_shape(self) -> tuple[int, ...]:
        """Shape of the scores of a unit."""

    def distributions(self, scores: np.ndarray) -> np.ndarray | None:
        """Probabilities of the V independent variables of each unit, [U, V, L], from its scores, for the queries of
        active learning; None for kinds without probabilities."""
        return None

    def decisions(self, scores: np.ndarray) -> np.ndarray:
        """Predicted value of each variable of `distributions`, int64 [U, V]."""
        return self.distributions(scores).argmax(-1)

    @abstractmethod
    def ideal_scores(self, labels: Sequence[Any]) -> np.ndarray:
        """Scores of a model without errors, float64 [U, ...], for the labels of N examples."""

    @abstractmethod
    def score_losses(self, scores: np.ndarray, labels: Sequence[Any]) -> np.ndarray:
        """Training loss of each unit, float64 [U], from its scores and the labels of N examples."""

    @abstractmethod
    def compared(self, metric: str, scores: np.ndarray, labels: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Predictions and labels in the form that `metric` compares."""

    def fitted(self, scores: np.ndarray, labels: Sequence[Any]) -> "TaskKind":
        """The kind with settings fitted to dev, such as thresholds; it is saved with the best epoch."""
        return self

    def ensemble(self, kinds: Sequence["TaskKind"]) -> "TaskKind":
        """The kind for the mean of the scores of several models, from their `kinds`, which include this one and have
        the same labels. Kinds whose `fitted` changes something override it."""
        return self

    def by_label(self, scores: np.ndarray, labels: Sequence[Any]) -> dict[str, dict[str, float]]:
        """precision, recall, f1 and support of each label; empty for kinds without such a table."""
        return {}

    @abstractmethod
    def prediction(self, scores: np.ndarray) -> Any:
        """Prediction for an example from the scores of its units; for kinds with `labels_words`, a list with a
        prediction for each word."""

    @abstractmethod
    def prediction_row(self, example: Example, scores: np.ndarray) -> dict[str, Any]:
        """Prediction for an example, in the form of a line of `fastbert predict`."""

    def errors(self, example: Example, scores: np.ndarray) -> list[dict[str, Any]] | None:
        """Errors in the prediction for an example with a label; None for kinds whose labels have no parts."""
        return None

    def check_metrics(self, names: Sequence[str]) -> None:
        """Checks that the metrics of a task suit the kind.

        Raises:
            UserError: a metric is unknown or does not suit the kind, or there is none.
        """
        if not names:
            raise UserError(f"a task needs a metric; name one of: {', '.join(METRICS)}")
        for name in names:
            choose("metric", name, METRICS)
            if names.count(name) > 1:
                raise UserError(f"the metric {name} is given twice; give each once")
            if name not in self.metrics:
                fitting = ", ".join(self.metrics)
                raise UserError(f"the metric {name} does not fit labels that are {self.plural}; give one of: {fitting}")


def declared_labels(
    task: str, source: CustomSource, learn: Callable[[Iterable[Row]], tuple[str, ...]]
) -> tuple[str, ...]:
    """Labels of a custom task: from its options, from the names in Parquet, or by `learn` from the training rows.

    Raises:
        UserError: there are none, or too few.
    """
    given = source.options.labels
    labels = tuple(words(given or ""))
    if len(set(labels)) != len(labels) or len(labels) == 1:
        raise UserError(f"labels {given!r}: give two or more different names, separated by commas")
    if not labels:
        if "train" not in source.paths:
            raise UserError(f"task {task}: without a train file, give the labels")
        labels = tuple(name.strip() for name in source.class_names() or ())
        check_class_names(labels, f"{source.paths['train']}: the ClassLabel of the labels")
    if not labels:
        source.check_rows("train")
        labels = learn(source.rows("train", []))
    return labels


def check_class_names(labels: Sequence[str], where: str) -> None:
    """Raises a UserError if the names in a Parquet file cannot be the labels of a task."""
    if len(set(labels)) != len(labels) or len(labels) == 1:
        raise UserError(f"{where} names {brief(', '.join(labels), str)}; give it two or more different names")
    for number, label in enumerate(labels):
        if problem := text_problem(label) if label else "is empty":
            raise UserError(f"{where}: name {number} {problem}; write the file with another name")


def by_class(found: np.ndarray, expected: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each label, from ids [U]; 0 where they are undefined."""
    from sklearn.metrics import precision_recall_fscore_support

    names = ("precision", "recall", "f1", "support")
    columns = precision_recall_fscore_support(expected, found, labels=range(len(labels)), zero_division=0)
    return {label: dict(zip(names, map(float, row), strict=True)) for label, *row in zip(labels, *columns, strict=True)}


def not_a_label(where: str, label: Any) -> UserError:
    """Error for NaN and infinities, which no kind of task can learn."""
    return UserError(
        f"{where}: the label {brief(label)} is neither a finite number nor a class; fill it in or drop the row"
    )
