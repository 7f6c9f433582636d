"""Choice of the texts to label in a round, by a query."""

from collections.abc import Callable

import numpy as np

from fastbert.dataset_work.selection.queries import (
    entropy,
    facility_location,
    gaussian_similarity,
    highest,
    k_centre,
    least_confidence,
    margin,
)
from fastbert.errors import UserError
from fastbert.finetuning.continual.outputs import Outputs
from fastbert.finetuning.kinds.kind import TaskKind

UNCERTAINTY = {"entropy": entropy, "least-confidence": least_confidence, "margin": margin}
MOST_COMPARED = 5000
"""Texts of the pool, sampled uniformly, that k-centre and facility-location compare with each other."""

OutputsOf = Callable[[np.ndarray], Outputs]
"""Rows of the pool, int64 [n] -> the model's outputs for them, without dropout."""


def check_query(query: str, kind: TaskKind, task: str) -> None:
    """Raises a UserError if the kind has no probabilities, which the query needs."""
    if query not in ("random", "k-centre") and kind.name != "classes":
        raise UserError(
            f"the query {query} needs the probabilities of classes, and {task} predicts {kind.plural}; use random or "
            "k-centre"
        )


def acquire(
    query: str, order: np.ndarray, labelled: np.ndarray, count: int, outputs: OutputsOf
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of the pool to label, in the order of their selection, and the value of each; None for random.

    Args:
        order: all rows of the pool in a random order, which breaks ties: equal for all learners with one seed.
        labelled: rows that are labelled already.
        count: at most the number of the others.
    """
    free = order[~np.isin(order, labelled)]
    if query == "random":
        return free[:count], None
    if query in UNCERTAINTY:
        found = highest(UNCERTAINTY[query](probabilities(outputs(free).logits)), count)
        return free[found.rows], found.values
    free = free[: max(count, MOST_COMPARED)]
    its = outputs(free)
    if query == "k-centre":
        found = k_centre(its.states, count, outputs(labelled).states)
    else:
        found = facility_location(gaussian_similarity(its.states), count, entropy(probabilities(its.logits)))
    return free[found.rows], found.values


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of float32 [n, L], float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
