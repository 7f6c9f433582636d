"""Any number of labels for each example: a sigmoid for each label, and the mean of their binary cross-entropies.

A label is predicted if its probability reaches its threshold: 0.5 during training, afterwards the threshold with the
highest F1 of that label on dev.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert.data.text import clean
from fastbert.errors import UserError, brief, nearest
from fastbert.finetuning.averages import mean_of_models
from fastbert.finetuning.custom import CustomSource
from fastbert.finetuning.kinds.classes import in_order
from fastbert.finetuning.kinds.kind import TaskKind, by_class, declared_labels
from fastbert.finetuning.rows import Example, Row
from fastbert.ranges import text_problem

if TYPE_CHECKING:
    from torch import Tensor, nn

SEPARATOR = ";"
"""Separator of the labels in a cell with text."""
OTHER_SEPARATORS = ",|"
UNFITTED = 0.5
"""Threshold before it is fitted to dev."""


@dataclass(frozen=True)
class MultiLabel(TaskKind):
    """Labels are tuples of label ids in ascending order; scores and soft labels are the probabilities of the labels."""

    thresholds: tuple[float, ...] = ()
    """Threshold of each label; empty before they are fitted to dev."""

    name = "multi-label"
    plural = "several labels"
    min_labels = 2
    metrics = ("micro_f1", "macro_f1", "subset_accuracy")
    default_metrics = metrics
    architecture = "ForSequenceClassification"
    problem_type = "multi_label_classification"
    pipeline = "text-classification"
    missing_hint = "; an empty list, or an empty cell, means that no label applies"

    # --- files

    @classmethod
    def declared(cls, task: str, source: CustomSource) -> "MultiLabel":
        return cls(declared_labels(task, source, learn_labels))

    def read(self, row: Row) -> tuple[int, ...] | None:
        found = label_words(row)
        if found is None:
            return None
        for word in found:
            if word not in self.ids:
                known = f"{nearest(word, self.ids)} (the labels are those of the training file, or of labels)"
                raise UserError(f"{row.where}: unknown label {brief(word)}; {separator_hint(row, word)}{known}")
        return tuple(sorted(self.ids[word] for word in found))

    def file_label(self, example: Example) -> list[str]:
        return [self.labels[label] for label in example.label]

    def settings(self) -> dict[str, Any]:
        return {"thresholds": dict(zip(self.labels, self.thresholds, strict=True))} if self.thresholds else {}

    def card(self) -> str:
        if not self.thresholds:
            return ""
        rows = "\n".join(f"- {label}: {value:.4g}" for label, value in zip(self.labels, self.thresholds, strict=True))
        return f"\nThresholds of the probabilities, fitted to dev (the metrics above are at {UNFITTED}):\n\n{rows}\n"

    @classmethod
    def restored(cls, labels: tuple[str, ...], settings: dict[str, Any], where: str) -> "MultiLabel":
        if not settings:
            return cls(labels)
        thresholds = settings.get("thresholds")
        if settings.keys() != {"thresholds"} or not isinstance(thresholds, dict) or thresholds.keys() != set(labels):
            raise UserError(f"{where} is damaged: its settings are not a threshold for each label")
        for label, value in thresholds.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"{where} is damaged: the threshold of {brief(label)} is {brief(value)}, not in [0, 1]")
        return cls(labels, tuple(float(thresholds[label]) for label in labels))

    # --- training

    def new_head(self, width: int, dropout: float) -> "nn.Module":
        from fastbert.finetuning.task_heads import PooledHead

        return PooledHead(width, len(self.labels), dropout)

    def targets(self, labels: Sequence[tuple[int, ...]]) -> np.ndarray:
        out = np.zeros((len(labels), len(self.labels)), np.float32)
        for row, ids in zip(out, labels, strict=True):
            row[list(ids)] = 1
        return out

    def losses(self, logits: "Tensor", targets: "Tensor") -> "Tensor":
        from torch.nn import functional as F

        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none").mean(-1)

    # --- scores

    def scores(self, logits: "Tensor") -> "Tensor":
        return logits.double().sigmoid()

    def score_shape(self) -> tuple[int, ...]:
        return (len(self.labels),)

    def distributions(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities that each label does not apply and that it does."""
        return np.stack([1.0 - scores, scores], -1)

    def decisions(self, scores: np.ndarray) -> np.ndarray:
        return self.decided(scores).astype(np.int64)

    def ideal_scores(self, labels: Sequence[tuple[int, ...]]) -> np.ndarray:
        return self.targets(labels).astype(np.float64)

    def score_losses(self, scores: np.ndarray, labels: Sequence[tuple[int, ...]]) -> np.ndarray:
        applies = np.log(np.maximum(scores, np.finfo(np.float64).tiny))
        not_so = np.log1p(-np.minimum(scores, np.nextafter(1.0, 0.0)))
        return -np.where(self.targets(labels) == 1, applies, not_so).mean(-1)

    def compared(
        self, metric: str, scores: np.ndarray, labels: Sequence[tuple[int, ...]]
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.decided(scores).astype(np.int64), self.targets(labels).astype(np.int64)

    def decided(self, scores: np.ndarray) -> np.ndarray:
        """bool [..., L]: the predicted labels."""
        return scores >= (np.array(self.thresholds) if self.thresholds else UNFITTED)

    def fitted(self, scores: np.ndarray, labels: Sequence[tuple[int, ...]]) -> "MultiLabel":
        expected = self.targets(labels) == 1
        return replace(self, thresholds=tuple(map(best_threshold, scores.T, expected.T)))

    def ensemble(self, kinds: Sequence["MultiLabel"]) -> "MultiLabel":
        """Averages the thresholds of each label, like its probabilities; UNFITTED counts for a model without
        thresholds."""
        if not any(kind.thresholds for kind in kinds):
            return self
        rows = [np.array(kind.thresholds or (UNFITTED,) * len(self.labels)) for kind in kinds]
        return replace(self, thresholds=tuple(mean_of_models(rows).tolist()))

    def by_label(self, scores: np.ndarray, labels: Sequence[tuple[int, ...]]) -> dict[str, dict[str, float]]:
        found, expected = self.compared("macro_f1", scores, labels)
        table = by_class(found, expected, self.labels)
        for label, threshold in self.settings().get("thresholds", {}).items():
            table[label]["threshold"] = threshold
        return table

    def prediction(self, scores: np.ndarray) -> list[str]:
        return [self.labels[label] for label in np.flatnonzero(self.decided(scores))]

    def prediction_row(self, example: Example, scores: np.ndarray) -> dict[str, Any]:
        probabilities = {label: float(value) for label, value in zip(self.labels, scores, strict=True)}
        return {"labels": self.prediction(scores), "probabilities": probabilities}

    def errors(self, example: Example, scores: np.ndarray) -> list[dict[str, Any]]:
        """Missed and spurious labels."""
        found, expected = self.decided(scores), self.targets([example.label])[0] == 1
        return [
            {"error": "missed" if expected[label] else "spurious", "label": self.labels[label]}
            for label in np.flatnonzero(found != expected)
        ]


def best_threshold(scores: np.ndarray, expected: np.ndarray) -> float:
    """The threshold t with the highest F1 of `scores >= t`. Candidates are 0.5 and the midpoints between neighboring
    scores (and between 0 and the lowest). Of equally good candidates, the one nearest to 0.5 is chosen, then the lower
    one. The result is 0.5 if no example has the label.

    Args:
        scores: probabilities [N] of a label.
        expected: bool [N], whether each example has the label.
    """
    if not expected.any():
        return UNFITTED
    ascending = np.unique(scores)
    below = np.concatenate([[0.0], ascending[:-1]])
    middle = (below + ascending) / 2
    middle = np.where(middle > below, middle, ascending)  # two neighbors in float64 have no number between them
    candidates = np.append(middle, UNFITTED)
    order = np.argsort(scores, kind="stable")
    first = np.searchsorted(scores[order], candidates)  # this example and those after it get the label
    right = np.append(np.cumsum(expected[order][::-1])[::-1], 0)[first]
    f1 = 2 * right / (len(scores) - first + expected.sum())
    return float(candidates[np.lexsort((candidates, np.abs(candidates - UNFITTED), -f1))[0]])


def label_words(row: Row) -> list[str] | None:
    """Label names of a row: a list, or a text with `;` between them; None if there is none.

    Raises:
        UserError: the label is neither, a name is empty or repeated, or the text is a list literal.
    """
    label = row.label
    if label is None:
        return None
    if isinstance(label, str):
        if label.strip().startswith("["):
            raise UserError(
                f"{row.where}: the cell {brief(label)} holds a list as text; write the labels with {SEPARATOR!r} "
                "between them, or the file as JSONL"
            )
        found: list[Any] = label.split(SEPARATOR) if label.strip() else []
    elif isinstance(label, list):
        found = label
    else:
        raise UserError(
            f"{row.where}: the label {brief(label)} is not a list of words; write a list, also for one label"
        )
    for word in found:
        if not isinstance(word, str):
            raise UserError(
                f"{row.where}: {brief(word)} in the list of labels is not a word; give the names of the labels"
            )
        if not word.strip():
            raise UserError(f"{row.where}: a label in {brief(label)} is empty; drop it")
    found = [clean(word, row.where).strip() for word in found]
    if len(set(found)) != len(found):
        word = next(word for word in found if found.count(word) > 1)
        raise UserError(f"{row.where}: the label {brief(word)} is repeated; drop one")
    return found


def separator_hint(row: Row, word: str) -> str:
    """Beginning of the remedy for a name that looks like several labels; empty for others."""
    other = next((one for one in OTHER_SEPARATORS if one in word), None)
    if other is None or not isinstance(row.label, str):
        return ""
    return f"write {SEPARATOR!r}, not {other!r}, between the labels in a cell; "


def learn_labels(rows: Iterable[Row]) -> tuple[str, ...]:
    """Label names of the training rows, sorted.

    Raises:
        UserError: a row has no labels, there are fewer than two labels, or one in a text contains a comma.
    """
    found: set[str] = set()
    for row in rows:
        labels = label_words(row)
        if labels is None:
            raise UserError(f"{row.where} has no label; train needs one in every row{MultiLabel.missing_hint}")
        for word in labels:
            if word not in found and (problem := text_problem(word)):
                raise UserError(f"{row.where}: the label {problem}; fix it, or name another column with --custom.label")
            if word not in found and (hint := separator_hint(row, word)):
                raise UserError(
                    f"{row.where}: the label {brief(word)} looks like several; {hint}if it is one, list all with labels"
                )
        found.update(labels)
    if len(found) < 2:
        raise UserError(
            f"the training file holds {len(found)} label(s) ({brief(', '.join(sorted(found)), str)}); the kind "
            "multi-label needs two or more (one that applies or not is kind: classes)"
        )
    return in_order(found)
