"""One of several classes for each example: softmax and cross-entropy."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert.errors import UserError, brief, nearest
from fastbert.finetuning.custom import CustomSource
from fastbert.finetuning.kinds.kind import TaskKind, declared_labels, not_a_label
from fastbert.finetuning.rows import Example, Row, number_in
from fastbert.finetuning.soft_labels import probabilities
from fastbert.ranges import text_problem

if TYPE_CHECKING:
    from torch import Tensor, nn

BINARY_METRICS = ("f1", "auc", "pairwise_accuracy")
SCORE_METRICS = ("auc", "pairwise_accuracy")  # computed from a score, the others from the most likely label


class Classes(TaskKind):
    """Labels are class ids; scores and soft labels are the probabilities of the classes."""

    name = plural = "classes"
    min_labels = 2
    metrics = ("accuracy", "f1", "macro_f1", "matthews", "auc", "pairwise_accuracy")
    default_metrics = ("accuracy",)
    architecture = "ForSequenceClassification"
    problem_type = "single_label_classification"
    pipeline = "text-classification"

    @classmethod
    def declared(cls, task: str, source: CustomSource) -> "Classes":
        return cls(declared_labels(task, source, learn_labels))

    def read(self, row: Row) -> int | None:
        word = label_word(row)
        if word is not None and word not in self.ids:
            raise UserError(f"{row.where}: unknown label {brief(word)}; {nearest(word, self.ids)}")
        return None if word is None else self.ids[word]

    def read_soft(self, row: Row) -> tuple[float, ...] | None:
        return None if row.soft is None else probabilities(row, self.labels)

    def harden(self, soft_label: Sequence[float]) -> int:
        """The most likely class, the first of several."""
        return int(np.argmax(soft_label))

    def file_label(self, example: Example) -> str:
        return self.labels[example.label]

    def new_head(self, width: int, dropout: float) -> "nn.Module":
        from fastbert.finetuning.task_heads import PooledHead

        return PooledHead(width, len(self.labels), dropout)

    def targets(self, labels: Sequence[int]) -> np.ndarray:
        return np.array(labels, np.int64)

    def losses(self, logits: "Tensor", targets: "Tensor") -> "Tensor":
        from torch.nn import functional as F

        return F.cross_entropy(logits, targets, reduction="none")

    def scores(self, logits: "Tensor") -> "Tensor":
        return logits.double().softmax(-1)

    def score_shape(self) -> tuple[int, ...]:
        return (len(self.labels),)

    def distributions(self, scores: np.ndarray) -> np.ndarray:
        return scores[:, None]

    def ideal_scores(self, labels: Sequence[int]) -> np.ndarray:
        return np.eye(len(self.labels))[list(labels)]

    def score_losses(self, scores: np.ndarray, labels: Sequence[int]) -> np.ndarray:
        return -np.log(np.maximum(scores[np.arange(len(labels)), labels], np.finfo(np.float64).tiny))

    def compared(self, metric: str, scores: np.ndarray, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return scores[:, 1] - scores[:, 0] if metric in SCORE_METRICS else scores.argmax(axis=1), np.asarray(labels)

    def prediction(self, scores: np.ndarray) -> str:
        return self.labels[int(np.argmax(scores))]

    def prediction_row(self, example: Example, scores: np.ndarray) -> dict[str, Any]:
        probabilities = {label: float(value) for label, value in zip(self.labels, scores, strict=True)}
        return {"label": self.prediction(scores), "probabilities": probabilities}

    def check_metrics(self, names: Sequence[str]) -> None:
        super().check_metrics(names)
        for name in names:
            if name in BINARY_METRICS and len(self.labels) != 2:
                others = ", ".join(other for other in self.metrics if other not in BINARY_METRICS)
                raise UserError(
                    f"the metric {name} is for two labels, and there are {len(self.labels)}; give one of: {others}"
                )


def label_word(row: Row) -> str | None:
    """The label of a row as text; None if there is none. Whole numbers, true and false are accepted.

    Raises:
        UserError: the label is a fraction, a list, ...: not a class.
    """
    label = row.label
    if label is None or isinstance(label, str):
        return label.strip() or None if label else None
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return str(int(label))  # a table with a missing cell stores whole numbers as 1.0
    if isinstance(label, float) and not math.isfinite(label):
        raise not_a_label(row.where, label)
    fitting = {float: "number", list: "multi-label"}.get(type(label))
    hint = f"set kind: {fitting}, or " if fitting else ""
    raise UserError(f"{row.where}: the label {brief(label)} is not a class; {hint}give a word or a whole number")


def learn_labels(rows: Iterable[Row]) -> tuple[str, ...]:
    """Label names of the training rows, sorted (as numbers if all are whole numbers).

    Raises:
        UserError: a row has no label, there are fewer than two labels, or they are fractions.
    """
    found: dict[str, str] = {}  # word -> where it was first seen
    for row in rows:
        word = label_word(row)
        if word is None:
            raise UserError(f"{row.where} has no label; training needs one in every row")
        if word not in found and (problem := text_problem(word)):
            raise UserError(f"{row.where}: the label {problem}; fix it, or name another column with --custom.label")
        found.setdefault(word, row.where)
    if len(found) < 2:
        raise UserError(
            f"the training file holds {len(found)} label(s) ({brief(', '.join(found), str)}); a task needs two or more"
        )
    for word, where in found.items():
        for separator in ",;|":
            if separator in word and all(part.strip() in found for part in word.split(separator)):
                raise UserError(
                    f"{where}: the label {brief(word)} is several labels of the training file; set kind: multi-label "
                    "(with ; between the labels in a cell), or name all labels with labels if it is one class"
                )
    numbers = [number_in(word) for word in found]
    if None not in numbers:
        if bad := [word for word, number in zip(found, numbers, strict=True) if not math.isfinite(number)]:
            raise not_a_label(found[bad[0]], bad[0])  # a missing value among numbers, not a word
        if all(number.is_integer() for number in numbers):
            return in_order(found)
        word = next(word for word in found if not float(word).is_integer())
        raise UserError(f"{found[word]}: the label {brief(word)} is a number, no class; set kind: number")
    return in_order(found)


def in_order(found: Iterable[str]) -> tuple[str, ...]:
    """Label names, sorted; as numbers if all are whole numbers."""
    numbers = {word: number_in(word) for word in found}
    whole = all(number is not None and number.is_integer() for number in numbers.values())
    return tuple(sorted(numbers, key=lambda word: (numbers[word] if whole else 0, word)))
