"""Choice of the texts to label in a round, by a query."""

from collections.abc import Callable

import numpy as np
import torch

from fastbert.dataset_work.selection.options import K_CENTRE, POOL_SIZE, RANDOM, SelectOptions
from fastbert.dataset_work.selection.queries import facility_location, gaussian_similarity, highest, k_centre
from fastbert.dataset_work.selection.scoring import UNCERTAINTIES
from fastbert.errors import UserError
from fastbert.finetuning.continual.outputs import Outputs
from fastbert.finetuning.kinds.kind import TaskKind

OutputsOf = Callable[[np.ndarray], Outputs]
"""Rows of the pool, int64 [n] -> the model's outputs for them, without dropout."""


def check_query(query: str, kind: TaskKind, task: str) -> None:
    """Raises a UserError if the query needs probabilities that the kind does not have."""
    if query in (RANDOM, K_CENTRE) or kind.distributions(np.zeros((0, *kind.score_shape()))) is not None:
        return
    raise UserError(
        f"the query {query} needs probabilities, and {task}, of kind {kind.name}, has no scores for it; give "
        f"{K_CENTRE} or {RANDOM}"
    )


def acquire(
    query: str, kind: TaskKind, order: np.ndarray, labelled: np.ndarray, count: int, outputs: OutputsOf
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of the pool to label, in the order of their selection, and the value of each; None for random.

    k-centre and facility-location compare at most `POOL_SIZE` texts of the pool, the first ones of `order`.

    Args:
        order: all rows of the pool in a random order, which breaks ties: equal for all learners with one seed.
        labelled: rows that are labelled already.
        count: at most the number of the others.
    """
    free = order[~np.isin(order, labelled)]
    if query == RANDOM:
        return free[:count], None
    if query in UNCERTAINTIES:
        found = highest(uncertainty(query, kind, outputs(free).logits), count)
        return free[found.rows], found.values
    free = free[: max(count, POOL_SIZE)]
    its = outputs(free)
    if query == K_CENTRE:
        found = k_centre(its.states, count, outputs(labelled).states)
    else:  # facility-location
        entropies = uncertainty("entropy", kind, its.logits)
        found = facility_location(
            gaussian_similarity(its.states), count, entropies, SelectOptions.entropy_weight * len(free)
        )
    return free[found.rows], found.values


def uncertainty(query: str, kind: TaskKind, logits: np.ndarray) -> np.ndarray:
    """Value of one of `UNCERTAINTIES` for each text, float64 [n]: the mean over the labels if several can apply."""
    scores = kind.scores(torch.from_numpy(logits)).numpy()
    return UNCERTAINTIES[query](kind.distributions(scores)).mean(-1)
