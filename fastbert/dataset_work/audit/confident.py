"""Confident learning (Northcutt, Jiang and Chuang 2021, arXiv 1911.00068): which labels of an audit are likely wrong.

`likely_wrong` equals cleanlab's `find_label_issues(labels, probabilities, filter_by="prune_by_noise_rate")`, which is
its default: the confident joint estimates how many examples with label i belong to j, and this number of them is
marked, those with the largest difference of the probabilities of j and i. An example whose label is the most likely
one is never marked.

Shapes: N examples, K labels. Probabilities are float64 [N, K], labels int64 [N].
"""

import numpy as np

TOLERANCE = 1e-6  # of two probabilities, as in cleanlab


def self_confidence(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The probability of the given label, [N]."""
    return probabilities[np.arange(len(labels)), labels]


def margins(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The probability of the given label minus the largest one of the others, [N] in [-1, 1]."""
    others = probabilities.copy()
    others[np.arange(len(labels)), labels] = -np.inf
    return self_confidence(probabilities, labels) - others.max(axis=1)


def thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean probability of each label over the examples that have it, [K]; 2, which none reaches, for a label
    without examples."""
    count = probabilities.shape[1]
    means = [probabilities[labels == k, k].mean() if (labels == k).any() else 2.0 for k in range(count)]
    return np.maximum(means, 2 * TOLERANCE)


def confident_joint(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Estimated number of examples with given label i and true label j, int64 [K, K]; row i sums to the number of
    examples with label i.

    An example counts for the label whose threshold it reaches, for the most likely one if it reaches several, and not
    at all if it reaches none. The diagonal is at least 1.
    """
    reached = probabilities >= thresholds(probabilities, labels) - TOLERANCE
    true = np.where(reached.sum(axis=1) > 1, probabilities.argmax(axis=1), reached.argmax(axis=1))
    joint = np.zeros((probabilities.shape[1],) * 2)
    counted = reached.any(axis=1)
    # Transposed and scaled as in cleanlab: in another order of summation, a half may be rounded to the other side.
    np.add.at(joint, (true[counted], labels[counted]), 1)
    np.fill_diagonal(joint, joint.diagonal().clip(min=1))
    counts = np.bincount(labels, minlength=len(joint))
    joint = joint / joint.sum(axis=0) * counts
    return rounded_rows((joint / joint.sum() * counts.sum()).T)


def likely_wrong(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Marks the labels that are likely wrong, bool [N]; see the module's docstring."""
    joint = confident_joint(probabilities, labels)
    pruned = to_prune(joint)
    found = np.zeros(len(labels), dtype=bool)
    for given in range(len(joint)):
        rows = np.flatnonzero(labels == given)
        if len(rows) <= 1:  # the last example of a label remains
            continue
        for true in range(len(joint)):
            if true != given and pruned[given, true]:
                differences = probabilities[rows, true] - probabilities[rows, given]
                found[rows[np.argsort(-differences)[: pruned[given, true]]]] = True
    raised = probabilities.copy()
    raised[np.arange(len(labels)), labels] += TOLERANCE
    return found & (raised.argmax(axis=1) != labels)


def to_prune(joint: np.ndarray) -> np.ndarray:
    """Number of examples to mark for each given and true label, int64 [K, K]: the confident joint, in which at least
    one example of each label remains unmarked; what the diagonal gains, the other entries lose equally."""
    diagonal = np.maximum(joint.diagonal(), 1)
    gained = diagonal - joint.diagonal()
    others = np.maximum(np.count_nonzero(joint, axis=1) - 1.0, 1.0)
    pruned = np.maximum(joint - (gained / others)[:, None], 0)
    np.fill_diagonal(pruned, diagonal)
    return rounded_rows(pruned.astype(np.int64).T).T


def rounded_rows(values: np.ndarray) -> np.ndarray:
    """Whole numbers with the same sums of rows: the entries with the largest rounding errors are changed by one."""
    rounded = values.round()
    for row, whole in zip(values, rounded, strict=True):
        while missing := int(np.round(row.sum().round() - whole.sum())):
            change = 1 if missing > 0 else -1
            order = np.argsort(row - whole)[::-change]
            whole[order[: min(abs(missing), len(row))]] += change
    return rounded.astype(np.int64)
