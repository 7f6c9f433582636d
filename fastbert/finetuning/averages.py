"""Mean of the scores of several models."""

from collections.abc import Sequence

import numpy as np


def mean_of_models(values: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over the models in float64, [...].

    The values of each element are added in ascending order: the order of the models changes no bit.

    Args:
        values: one array for each model, all of the same shape [...].
    """
    return np.sort(np.asarray(values, np.float64), axis=0).sum(axis=0) / len(values)
