"""What a task predicts for each example, and all that depends on it: labels in files, head, loss, scores, metrics,
predictions as JSON, and the class of the Hugging Face export.

Tasks are opened, and their labels checked, before torch is imported; so kinds import it where they compute with it.

Shapes: B examples of a batch, T tokens, D width, L outputs, N examples of a split, U units of it: what is scored, an
example or, where words have labels, a word.
"""

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

    from fastbert.data.tokenizer import WordPiece
    from fastbert.finetuning.batches import EncodedSplit


@dataclass(frozen=True)
class TaskKind(ABC):
    """A kind with the labels of one task."""

    labels: tuple[str, ...] = ()
    """Label words in the order of their ids; empty for kinds without a set of labels."""

    name: ClassVar[str]
    """As options and task.json spell it, a key of `KINDS`."""
    plural: ClassVar[str]
    """What the labels are, in messages."""
    least_labels: ClassVar[int]
    """Label words that a task needs; 0 for kinds without a set of labels."""
    metrics: ClassVar[tuple[str, ...]]
    """Names in `METRICS` that fit."""
    usual_metrics: ClassVar[tuple[str, ...]]
    """Those of a custom task that names none."""
    architecture: ClassVar[str]
    """End of the name of transformers' class for the export, behind Bert or FastBert."""
    problem_type: ClassVar[str | None]
    """Of the export's config.json; None for none."""
    pipeline: ClassVar[str]
    """Hugging Face's name for what the export does."""
    of_words: ClassVar[bool] = False
    """Whether the words of a text have labels, and not the text."""
    missing_hint: ClassVar[str] = ""
    """Ends the error for a row without a label."""

    @property
    def id2label(self) -> dict[str, str]:
        """Of the export's config.json: output -> word."""
        return {str(place): label for place, label in enumerate(self.labels)}

    @cached_property
    def ids(self) -> dict[str, int]:
        """Label word -> its id."""
        return {label: number for number, label in enumerate(self.labels)}

    # --- files

    @classmethod
    @abstractmethod
    def declared(cls, task: str, source: CustomSource) -> "TaskKind":
        """The kind of the custom task `task`, with the labels that its options name, or its training file.

        Raises:
            UserError: there are none, or too few.
        """

    @abstractmethod
    def read(self, row: Row) -> Any:
        """The label of a row as `Example.label` holds it; None where there is none.

        Raises:
            UserError: names the row, and what is wrong with its label.
        """

    @abstractmethod
    def shown(self, example: Example) -> Any:
        """The label of an example as files spell it."""

    def settings(self) -> dict[str, Any]:
        """What task.json holds of it in addition to the labels."""
        return {}

    def card(self) -> str:
        """What the model card reports of the settings: lines, or nothing."""
        return ""

    @classmethod
    def restored(cls, labels: tuple[str, ...], settings: dict[str, Any], where: str) -> "TaskKind":
        """The kind that was saved with these labels and `settings`.

        Raises:
            UserError: the settings in the file `where` do not fit.
        """
        if settings:
            raise UserError(f"{where} is damaged: the kind {cls.name} has no settings")
        return cls(labels)

    # --- training

    def encode(self, examples: Sequence[Example], vocabulary: "WordPiece", max_length: int) -> "EncodedSplit":
        """The examples as ids, at most `max_length` tokens in each row."""
        from fastbert.finetuning.batches import encode

        return encode(examples, vocabulary, max_length, self.targets)

    @abstractmethod
    def new_head(self, width: int, dropout: float) -> "nn.Module":
        """The layers on top of the encoder, as `task_heads.PooledHead`."""

    @abstractmethod
    def targets(self, labels: Sequence[Any]) -> np.ndarray:
        """The labels as training reads them, [U] or [U, ...]."""

    @abstractmethod
    def losses(self, logits: "Tensor", targets: "Tensor") -> "Tensor":
        """The loss of each row, [B], the sum over its units.

        Args:
            logits: what the head gives, float32 at least.
            targets: rows of `targets`, or soft labels: what `scores` would be ideally.
        """

    # --- scores

    @abstractmethod
    def scores(self, logits: "Tensor") -> "Tensor":
        """float64 [B, ...], or where words have labels [B, T, ...]: what is predicted, averaged and measured."""

    @abstractmethod
    def score_shape(self) -> tuple[int, ...]:
        """The shape of the scores of a unit."""

    @abstractmethod
    def ideal_scores(self, labels: Sequence[Any]) -> np.ndarray:
        """float64 [U, ...]: the scores of a model that is always right, for the labels of N examples."""

    @abstractmethod
    def score_losses(self, scores: np.ndarray, labels: Sequence[Any]) -> np.ndarray:
        """float64 [U]: the training loss of each unit, from its scores; `labels` of N examples."""

    @abstractmethod
    def compared(self, metric: str, scores: np.ndarray, labels: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The predictions and labels that `metric` compares."""

    def fitted(self, scores: np.ndarray, labels: Sequence[Any]) -> "TaskKind":
        """The kind with what dev decides, such as thresholds; it is saved with the best epoch."""
        return self

    def ensemble(self, kinds: Sequence["TaskKind"]) -> "TaskKind":
        """The kind that decides from the mean of the scores of several models, whose `kinds`, this one included, have
        the same labels; kinds whose `fitted` changes something override it."""
        return self

    def by_label(self, scores: np.ndarray, labels: Sequence[Any]) -> dict[str, dict[str, float]]:
        """precision, recall, f1 and support of each label, where that says more than the metrics."""
        return {}

    @abstractmethod
    def prediction(self, scores: np.ndarray) -> Any:
        """The answer for an example, from the scores of its units; of kinds `of_words` a list, one for each word."""

    @abstractmethod
    def answer(self, example: Example, scores: np.ndarray) -> dict[str, Any]:
        """The prediction for an example, as a line of `fastbert predict` holds it."""

    def errors(self, example: Example, scores: np.ndarray) -> list[dict[str, Any]] | None:
        """What is wrong in the prediction for an example with a label; None for kinds whose labels have no parts."""
        return None

    def check_metrics(self, names: Sequence[str]) -> None:
        """Checks that the metrics of a task fit it.

        Raises:
            UserError: a metric is unknown or does not fit, or none is named.
        """
        if not names:
            raise UserError(f"a task needs a metric; name one of: {', '.join(METRICS)}")
        for name in names:
            choose("metric", name, METRICS)
            if names.count(name) > 1:
                raise UserError(f"the metric {name} is named twice; name each once")
            if name not in self.metrics:
                fitting = ", ".join(self.metrics)
                raise UserError(f"the metric {name} does not fit labels that are {self.plural}; give one of: {fitting}")


def declared_labels(
    task: str, source: CustomSource, learn: Callable[[Iterable[Row]], tuple[str, ...]]
) -> tuple[str, ...]:
    """The labels of a custom task: those that its options name, those that Parquet names, or what `learn` finds in the
    training rows.

    Raises:
        UserError: there are none, or too few.
    """
    given = source.options.labels
    labels = tuple(words(given or ""))
    if len(set(labels)) != len(labels) or len(labels) == 1:
        raise UserError(f"labels {given!r}: give two or more different words, a comma between them")
    if not labels:
        if "train" not in source.paths:
            raise UserError(f"task {task}: without a train file to learn them from, give the labels")
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
    """The error for NaN and infinities, which no kind of task can learn."""
    return UserError(
        f"{where}: the label {brief(label)} is no number that can be learned and no class; fill it in or drop the row"
    )
