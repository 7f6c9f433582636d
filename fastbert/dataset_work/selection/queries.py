"""Queries of active learning: functions of a model's probabilities and hidden states that select the rows to label.

A higher value is more informative. Rows with equal values are selected in ascending order. A caller that sorts its rows
by a hash of the text therefore gets the same selection for any order of its input.

Shapes: n rows, L classes, D width, m rows that are already labelled. Logarithms are natural.
"""

from typing import NamedTuple

import numpy as np

MEDIAN_ROWS = 1000  # maximum number of rows whose distances give the default width
BLOCK = 1024  # rows of a block of distances


class Selection(NamedTuple):
    """Selected rows in the order of their selection."""

    rows: np.ndarray
    """int64 [count]."""
    values: np.ndarray
    """float64 [count]: the value for which each was selected."""


# --- uncertainty


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy of each distribution, -sum p log p with 0 log 0 = 0: 0 to log L.

    Args:
        p: probabilities [..., L].

    Returns:
        float64 [...].
    """
    p = np.asarray(p, np.float64)
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1)


def least_confidence(p: np.ndarray) -> np.ndarray:
    """Probability that the most likely class is wrong, 1 - max p: 0 to 1 - 1 / L.

    Args:
        p: probabilities [..., L].

    Returns:
        float64 [...].
    """
    return 1.0 - np.asarray(p, np.float64).max(-1)


def margin(p: np.ndarray) -> np.ndarray:
    """Closeness of the two most likely classes, 1 - (first - second): 1 if they are equally likely. The literature
    selects the smallest differences: the same rows.

    Args:
        p: probabilities [..., L], L of 2 or more.

    Returns:
        float64 [...].
    """
    largest = np.partition(np.asarray(p, np.float64), -2, axis=-1)
    return 1.0 - (largest[..., -1] - largest[..., -2])


def highest(values: np.ndarray, count: int) -> Selection:
    """The `count` rows with the highest values [n], in descending order."""
    _check(count, len(values))
    rows = np.argsort(-np.asarray(values, np.float64), kind="stable")[:count]
    return Selection(rows, np.asarray(values, np.float64)[rows])


# --- hidden states


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, float64 [n, m], of the rows of `a` [n, D] and `b` [m, D]."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    found = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2.0 * (a @ b.T)
    return np.maximum(found, 0.0, out=found)


def k_centre(states: np.ndarray, count: int, chosen_states: np.ndarray | None = None) -> Selection:
    """Farthest-first traversal (Gonzalez 1985; for active learning Sener and Savarese, arXiv 1708.00489): repeatedly
    selects the row farthest from all centres. The largest distance of a row to its centre is then at most twice that
    with the best `count` centres.

    Without `chosen_states` the first centre is the row nearest to the mean of all.

    Args:
        states: [n, D].
        count: number of centres to select, at most n.
        chosen_states: [m, D], the centres to start with, such as the labelled rows.

    Returns:
        rows; values: the distance of each to the nearest centre before it; of the first one without `chosen_states`
            the distance to the mean.
    """
    states = np.asarray(states, np.float64)
    _check(count, len(states))
    norms = np.square(states).sum(1)

    def squared(center: np.ndarray) -> np.ndarray:
        return np.maximum(norms + np.square(center).sum() - 2.0 * (states @ center), 0.0)

    nearest = np.full(len(states), np.inf)  # [n], squared distance to the nearest centre
    chosen_states = [] if chosen_states is None else chosen_states
    for at in range(0, len(chosen_states), BLOCK):
        np.minimum(nearest, squared_distances(states, chosen_states[at : at + BLOCK]).min(1), out=nearest)
    rows: list[int] = []
    values: list[float] = []
    while len(rows) < count:
        if rows or len(chosen_states):
            row = int(np.argmax(nearest))
            values.append(nearest[row])
        else:
            from_mean = squared(states.mean(0))
            row = int(np.argmin(from_mean))
            values.append(from_mean[row])
        rows.append(row)
        np.minimum(nearest, squared(states[row]), out=nearest)
        nearest[rows] = -1.0  # also where all others are copies of a centre, a row is selected once
    return Selection(np.array(rows, np.int64), np.sqrt(np.array(values, np.float64)))


def median_distance(states: np.ndarray) -> float:
    """Median distance between two of the first `MEDIAN_ROWS` rows of `states` [n, D], a usual width of a Gaussian
    kernel; 1 if it is 0."""
    part = np.asarray(states)[:MEDIAN_ROWS]
    found = (
        float(np.median(np.sqrt(squared_distances(part, part)[np.triu_indices(len(part), 1)]))) if len(part) > 1 else 0
    )
    return found if found > 0 else 1.0


def gaussian_similarity(states: np.ndarray, width: float | None = None) -> np.ndarray:
    """Similarities exp(-|phi_i - phi_j|^2 / (2 width^2)), float32 [n, n], 1 on the diagonal.

    Args:
        states: phi, [n, D].
        width: sigma; None for the median distance.
    """
    states = np.asarray(states, np.float64)
    width = median_distance(states) if width is None else width
    out = np.empty((len(states), len(states)), np.float32)
    for at in range(0, len(states), BLOCK):
        out[at : at + BLOCK] = np.exp(squared_distances(states[at : at + BLOCK], states) / (-2.0 * width**2))
    np.fill_diagonal(out, 1.0)
    return out


def facility_location(similarity: np.ndarray, count: int, entropies: np.ndarray, weight: float = 1.0) -> Selection:
    """Lazy greedy maximization (Minoux 1978) of the function of SDS2 (Das, Bhatt et al. 2023, arXiv 2305.06408),

        F(A) = sum over i of max over j in A of w_ij + weight * log(1 + sum over j in A of h_j),    F({}) = 0,

    facility location and a concave function of the sum of the entropies. F is monotone and submodular for w and h of
    0 or more, so F of the result is at least 1 - 1 / e of that of the best set. The result equals that of greedy
    selection, which computes all gains anew in each step. Here only the highest one is computed again, until it remains
    the highest: gains never grow. The gains of the second term cost little, so all of them are computed.

    Args:
        similarity: w, symmetric [n, n], 0 or more, such as `gaussian_similarity`.
        count: number of rows to select, at most n.
        entropies: h, [n], 0 or more.
        weight: lambda, 0 or more.

    Returns:
        rows; values: the gain of each, F with it minus F without it.
    """
    _check(count, len(similarity))
    entropies = np.asarray(entropies, np.float64)
    covered = np.zeros(len(similarity), similarity.dtype)  # [n], the maximum over the selected rows
    # [n], the gains of the first term, each as it was when `computed` rows were selected
    coverage = np.array([row.sum(dtype=np.float64) for row in similarity])
    computed = np.zeros(len(similarity), np.int64)
    rows: list[int] = []
    values: list[float] = []
    summed = 0.0
    while len(rows) < count:
        uncertain = weight * np.log1p(entropies / (1.0 + summed))  # [n], the gains of the second term
        gains = coverage + uncertain
        gains[rows] = -1.0
        while computed[row := int(np.argmax(gains))] < len(rows):
            coverage[row] = np.maximum(similarity[row] - covered, 0).sum(dtype=np.float64)
            computed[row] = len(rows)
            gains[row] = coverage[row] + uncertain[row]
        rows.append(row)
        values.append(float(gains[row]))
        np.maximum(covered, similarity[row], out=covered)
        summed += entropies[row]
    return Selection(np.array(rows, np.int64), np.array(values, np.float64))


def _check(count: int, rows: int) -> None:
    if not 0 <= count <= rows:
        raise ValueError(f"{count} rows to select of {rows}")
