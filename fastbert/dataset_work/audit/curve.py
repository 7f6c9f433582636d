"""The learning curve: the out-of-fold error over the number of training examples, a power law, and the effect of more
labels.

error(n) = a n^-b + c with a, c >= 0 is fitted by least squares: for each exponent b on a grid, a and c have a closed
form. The intervals are of a bootstrap in two stages: folds, so that the randomness of the trainings counts, and
examples within a fold. The sampled folds and examples are the same for all sizes.

Shapes: S sizes, N examples, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXPONENTS = np.geomspace(0.05, 2.0, 120)
RESAMPLES = 1000
MORE = 1.1  # times the number of labels
LEAST_SIZES = 3  # for a curve with three parameters


@dataclass(frozen=True)
class PowerLaw:
    """error(n) = a n^-b + c."""

    a: float
    b: float
    c: float

    def at(self, size: float) -> float:
        return self.a * size**-self.b + self.c


@dataclass(frozen=True)
class LearningCurve:
    """The curve with its 95 % intervals."""

    sizes: list[float]
    """Mean number of training examples over the folds, ascending."""
    errors: list[float]
    intervals: list[tuple[float, float]]
    """Intervals of the errors."""
    law: PowerLaw | None
    """None for fewer than three sizes."""
    gain: float | None
    """Decrease of the error with 10 % more labels than the audited task has, by the power law."""
    gain_interval: tuple[float, float] | None


def learning_curve(sizes: Sequence[float], losses: np.ndarray, folds: np.ndarray, seed: int) -> LearningCurve:
    """Fits the curve.

    Args:
        sizes: ascending, [S].
        losses: error of each example [S, N], 0 or 1, or squared.
        folds: int64 [N].
        seed: of the bootstrap.
    """
    errors, labels = losses.mean(axis=1), len(folds)
    resampled = bootstrap(losses, folds, seed)
    intervals = [interval(values) for values in resampled.T]
    law = gain = gain_interval = None
    if len(sizes) >= LEAST_SIZES:
        (a,), (b,), (c,) = fit(np.asarray(sizes), errors[None])
        law = PowerLaw(float(a), float(b), float(c))
        gain = law.at(labels) - law.at(MORE * labels)
        a, b, _ = fit(np.asarray(sizes), resampled)
        gain_interval = interval(a * (labels**-b - (MORE * labels) ** -b))
    return LearningCurve([*map(float, sizes)], errors.tolist(), intervals, law, gain, gain_interval)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def bootstrap(losses: np.ndarray, folds: np.ndarray, seed: int) -> np.ndarray:
    """Mean losses of resampled folds and examples, [R, S]."""
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    means = np.empty((RESAMPLES, len(losses)))
    for number in range(RESAMPLES):
        chosen = [rng.choice(rows[fold], len(rows[fold])) for fold in rng.integers(len(rows), size=len(rows))]
        means[number] = losses[:, np.concatenate(chosen)].mean(axis=1)
    return means


def fit(sizes: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The least-squares power law of each row of `errors` [R, S]: a, b and c, [R] each.

    For a given b it is linear in x = n^-b. If the solution has a negative a or c, the best one has a = 0 or c = 0: the
    problem is convex.
    """
    count = len(errors)
    best, law = np.full(count, np.inf), np.zeros((3, count))
    mean = errors.mean(axis=1)
    for exponent in EXPONENTS:
        x = (sizes / sizes[-1]) ** -exponent  # relative to the largest size, for a well-conditioned problem
        centered = x - x.mean()
        slope = (errors - mean[:, None]) @ centered / (centered @ centered)
        offset = mean - slope * x.mean()
        through_zero = np.maximum(errors @ x / (x @ x), 0.0)
        slope, offset = (
            np.where(slope < 0, 0.0, np.where(offset < 0, through_zero, slope)),
            np.where(slope < 0, mean, np.where(offset < 0, 0.0, offset)),
        )
        squares = ((slope[:, None] * x + offset[:, None] - errors) ** 2).sum(axis=1)
        better = squares < best
        best[better] = squares[better]
        law[:, better] = np.stack([slope * sizes[-1] ** exponent, np.full(count, exponent), offset])[:, better]
    return law[0], law[1], law[2]
