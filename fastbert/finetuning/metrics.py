"""Metrics as on GLUE's server, computed by scikit-learn and SciPy.

A new metric is one function, one line in `METRICS`, and its name in the kinds of tasks that it suits.
"""

from collections.abc import Callable

import numpy as np

from fastbert.errors import UserError
from fastbert.finetuning.entities import common, precision_recall_f1


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of correct label ids [N]."""
    return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of label 1 of two labels, from ids [N]; 0 if neither predictions nor labels contain it (as in
    scikit-learn)."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, zero_division=0))


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 of all labels in predictions or labels [N], or of all L labels, 0 or 1 in [N, L].

    Raises:
        UserError: no example of [N, L] has a label, so F1 is undefined.
    """
    if labels.ndim == 2:
        _require_labels(labels)
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def micro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of all pairs of an example and a label, 0 or 1 in [N, L].

    Raises:
        UserError: no example has a label, so F1 is undefined.
    """
    _require_labels(labels)
    right = int((predictions & labels).sum())
    return precision_recall_f1(right, int(predictions.sum()), int(labels.sum()))[2]


def subset_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of the examples whose labels, 0 or 1 in [N, L], are all correct."""
    return float((predictions == labels).all(axis=1).mean())


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of label ids [N]; 0 if all predictions, or all labels, are the same."""
    from sklearn.metrics import matthews_corrcoef

    if _constant(predictions) or _constant(labels):
        return 0.0  # the value of scikit-learn, which also warns
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of numbers [N]. If either is constant it is undefined (nan in SciPy) and counts as 0.

    A model that has learned nothing then has a low score that can be compared.
    """
    from scipy.stats import pearsonr

    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(pearsonr(predictions.astype(np.float64), labels.astype(np.float64)).statistic)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation of numbers [N]; 0 if either is constant, as for `pearson`."""
    from scipy.stats import spearmanr

    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(spearmanr(predictions, labels).statistic)


def auc(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of scores [N] for label 1 of ids [N].

    Raises:
        UserError: all labels are the same, so it is undefined.
    """
    from sklearn.metrics import roc_auc_score

    if _constant(labels):
        raise UserError(f"AUC needs examples of both labels, and all {len(labels)} have the same; give more examples")
    return float(roc_auc_score(labels, predictions))


def pairwise_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of the pairs of examples with different labels whose scores [N] have the same order; ties count half.

    With P concordant pairs, Q discordant ones and T tied in score only, it is (P + T/2) / (P + Q + T). Kendall's tau-b,
    computed in n log n steps, is (P - Q) / sqrt((P + Q + T) (P + Q + U)) with U pairs tied in label only.

    Raises:
        UserError: all labels are the same, so there is no such pair.
    """
    from scipy.stats import kendalltau

    if _constant(labels):
        raise UserError(
            f"pairwise accuracy needs examples with different labels, and all {len(labels)} have the same; "
            "give more examples"
        )
    if _constant(predictions):
        return 0.5
    different_labels, different_scores = _different_pairs(labels), _different_pairs(predictions)
    tau = kendalltau(predictions, labels).statistic
    return 0.5 + 0.5 * float(tau) * (different_scores / different_labels) ** 0.5


def entity_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of entities [n, 4] (`entities.decode`), all types together.

    Raises:
        UserError: there are no entities in the labels, so it is undefined; the same for precision and recall.
    """
    return _of_entities(predictions, labels)[2]


def entity_precision(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of the predicted entities that are correct; 0 if none is predicted."""
    return _of_entities(predictions, labels)[0]


def entity_recall(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of the entities that are predicted."""
    return _of_entities(predictions, labels)[1]


def _of_entities(predictions: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    if not len(labels):
        raise UserError("entity F1 needs entities, and every word has the tag O; give more sentences")
    return precision_recall_f1(len(common(predictions, labels)), len(predictions), len(labels))


def _require_labels(labels: np.ndarray) -> None:
    if not labels.any():
        raise UserError(
            f"F1 needs labels, and all {len(labels)} examples have an empty list; give more examples (where the labels "
            "are not known, leave the column out)"
        )


def _constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def _different_pairs(values: np.ndarray) -> int:
    """Number of pairs of indices whose values differ."""
    counts = np.unique(values, return_counts=True)[1]
    return (len(values) * (len(values) - 1) - int((counts * (counts - 1)).sum())) // 2


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "micro_f1": micro_f1,
    "subset_accuracy": subset_accuracy,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "auc": auc,
    "pairwise_accuracy": pairwise_accuracy,
    "entity_f1": entity_f1,
    "entity_precision": entity_precision,
    "entity_recall": entity_recall,
}
