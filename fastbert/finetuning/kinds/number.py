"""A number for each example: regression with the squared error."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert.errors import UserError, brief
from fastbert.finetuning.custom import CustomSource
from fastbert.finetuning.kinds.kind import TaskKind, not_a_label
from fastbert.finetuning.rows import Example, Row, number_in
from fastbert.finetuning.soft_labels import check_size, soft_number

if TYPE_CHECKING:
    from torch import Tensor, nn


class Number(TaskKind):
    """Labels, soft labels and scores are numbers."""

    name = "number"
    plural = "numbers"
    min_labels = 0
    metrics = ("pearson", "spearman", "pairwise_accuracy")
    default_metrics = ("pearson", "spearman")
    architecture = "ForSequenceClassification"
    problem_type = "regression"
    pipeline = "text-classification"

    @property
    def id2label(self) -> dict[str, str]:
        return {"0": "score"}

    @classmethod
    def declared(cls, task: str, source: CustomSource) -> "Number":
        return cls()

    def read(self, row: Row) -> float | None:
        label = row.label
        if label is None or (isinstance(label, str) and not label.strip()):
            return None
        number = number_in(label)
        if number is None:
            fitting = "classes" if isinstance(label, str | bool) else "multi-label" if isinstance(label, list) else None
            hint = f", or set kind: {fitting}" if fitting else ""
            raise UserError(f"{row.where}: the label {brief(label)} is not a number; fix it{hint}")
        if not math.isfinite(number):
            raise not_a_label(row.where, label)
        check_size(row.where, f"label {brief(label)}", number)
        return number

    def read_soft(self, row: Row) -> float | None:
        return None if row.soft is None else soft_number(row)

    def harden(self, soft_label: float) -> float:
        return soft_label

    def file_label(self, example: Example) -> float:
        return example.label

    def new_head(self, width: int, dropout: float) -> "nn.Module":
        from fastbert.finetuning.task_heads import PooledHead

        return PooledHead(width, 1, dropout)

    def targets(self, labels: Sequence[float]) -> np.ndarray:
        return np.array(labels, np.float32)

    def losses(self, logits: "Tensor", targets: "Tensor") -> "Tensor":
        return (logits.squeeze(-1) - targets).square()

    def scores(self, logits: "Tensor") -> "Tensor":
        return logits.double().squeeze(-1)

    def score_shape(self) -> tuple[int, ...]:
        return ()

    def ideal_scores(self, labels: Sequence[float]) -> np.ndarray:
        return np.asarray(labels, dtype=np.float64)

    def score_losses(self, scores: np.ndarray, labels: Sequence[float]) -> np.ndarray:
        return (scores - np.asarray(labels)) ** 2

    def compared(self, metric: str, scores: np.ndarray, labels: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        return scores, np.asarray(labels)

    def prediction(self, scores: np.ndarray) -> float:
        return float(scores)

    def prediction_row(self, example: Example, scores: np.ndarray) -> dict[str, Any]:
        return {"value": self.prediction(scores)}
