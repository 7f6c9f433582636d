"""Paired tests of two checkpoints over the same seeds, and their adjustment for multiple comparisons."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05
_EXACT = 20  # pairs up to which all combinations of signs are computed
_SAMPLES = 200_000


@dataclass(frozen=True)
class Paired:
    """Mean difference b - a of pairs of scores, with its interval and tests."""

    n: int
    mean: float
    low: float | None
    """Lower end of the 95 % interval by Student's t; None without a spread: for one pair, or if all differences are
    equal, such as those of two models that give every example the most frequent label."""
    high: float | None
    p_t: float | None
    """p-value of the two-sided paired t-test; None like `low`."""
    p_flip: float
    """p-value of the two-sided sign-flip permutation test."""


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compares `b` with `a`, pair by pair.

    The t-test assumes that the differences are normally distributed. The sign-flip test only assumes that they are
    symmetric about zero under the null hypothesis: p is the fraction of all 2^n combinations of signs that give a mean
    at least as far from zero.
    """
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    n, mean = len(differences), float(differences.mean())
    low = high = p_t = None
    if n > 1 and float(np.ptp(differences)) > 1e-12:  # equal differences of scores differ by rounding
        from scipy.stats import t

        error = float(differences.std(ddof=1)) / math.sqrt(n)
        reach = float(t.ppf(1 - LEVEL / 2, n - 1)) * error
        low, high = mean - reach, mean + reach
        p_t = float(2 * t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, low, high, p_t, sign_flip(differences))


def sign_flip(differences: np.ndarray) -> float:
    """The p-value of the sign-flip permutation test on float64 [n]: exact up to 20 pairs, above by random signs."""
    n = len(differences)
    observed = abs(differences.sum())
    # Sums that are mathematically equal differ by rounding.
    least = observed - 1e-9 * max(float(np.abs(differences).sum()), 1e-300)
    if n <= _EXACT:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
        return float(np.mean(np.abs(sums) >= least))
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(_SAMPLES, n))
    return float((np.sum(np.abs(signs @ differences) >= least) + 1) / (_SAMPLES + 1))


def flip_limits(pairs: Iterable[int], tests: int = 1, unit: str = "seed") -> str:
    """A sentence on the smallest p that a sign-flip test of few pairs can have, 2^(1 - n) for n pairs; empty if all of
    them can be below the level.

    Args:
        pairs: number of pairs, of one comparison or several.
        tests: number of tests in Holm's adjustment.
        unit: name of what is paired.
    """
    limits, pairs = [], set(pairs)
    for n in sorted(pairs):
        least = 2.0 ** (1 - n)
        adjusted = min(1.0, tests * least)
        if adjusted >= LEVEL:
            after = f" ({adjusted:.3g} adjusted over {tests})" if tests > 1 else ""
            limits.append(f"with {n} {unit}{'' if n == 1 else 's'} it cannot be less than {least:.3g}{after}")
    if not limits:
        return ""
    single = f"; with 1 {unit} there is no test, and nothing is decided" if 1 in pairs else ""
    return (
        f"Few pairs limit the p of a sign-flip test: {'; '.join(limits)}. Such a test cannot confirm a difference, so "
        f"the verdict rests on the t-test alone, which assumes normally distributed differences{single}."
    )


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjustment of p-values by name: it controls the probability that any true null hypothesis is rejected."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(values, key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in values}
