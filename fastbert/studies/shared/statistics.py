"""Two checkpoints over the same seeds: is the difference more than the spread? Tests on pairs, and many at once."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05
_EXACT = 20  # pairs up to which all signs are tried
_DRAWS = 200_000


@dataclass(frozen=True)
class Paired:
    """What pairs of scores say of the mean difference, b - a."""

    n: int
    mean: float
    low: float | None
    """Of the 95 % interval by Student's t; None where there is no spread to judge by: for one pair, or if all
    differences are the same, as those of two models that give every example the most frequent label."""
    high: float | None
    p_t: float | None
    """Of the paired t-test, two-sided; None as `low`."""
    p_flip: float
    """Of the sign-flip permutation test, two-sided."""


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compares `b` with `a`, place by place.

    The t-test takes the differences for normally distributed. The sign-flip test takes them only for symmetric about
    zero if nothing differs: p is the share of all 2^n choices of signs that give a mean at least as far from zero.
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
    """The p-value of the sign-flip permutation test on float64 [n]: exact up to 20 pairs, above from random signs."""
    n = len(differences)
    observed = abs(differences.sum())
    # Sums that are equal on paper differ by rounding.
    least = observed - 1e-9 * max(float(np.abs(differences).sum()), 1e-300)
    if n <= _EXACT:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
        return float(np.mean(np.abs(sums) >= least))
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(_DRAWS, n))
    return float((np.sum(np.abs(signs @ differences) >= least) + 1) / (_DRAWS + 1))


def flip_limits(pairs: Iterable[int], tests: int = 1) -> str:
    """The sentence on the least p that a sign-flip test of this few pairs can have, 2^(1 - n) for n pairs; empty where
    all of them can be below the level.

    Args:
        pairs: how many there are, of one comparison or several.
        tests: that Holm's adjustment is over.
    """
    limits, pairs = [], set(pairs)
    for n in sorted(pairs):
        least = 2.0 ** (1 - n)
        adjusted = min(1.0, tests * least)
        if adjusted >= LEVEL:
            after = f" ({adjusted:.3g} adjusted over {tests})" if tests > 1 else ""
            limits.append(f"with {n} seed{'' if n == 1 else 's'} it cannot be less than {least:.3g}{after}")
    if not limits:
        return ""
    single = "; with 1 seed there is no test, and nothing is decided" if 1 in pairs else ""
    return (
        f"Few pairs limit the p of a sign-flip test: {'; '.join(limits)}. So it can confirm no difference there, and a "
        f"verdict rests on the t-test alone, which takes the differences for normally distributed{single}."
    )


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjustment of p-values by name: where nothing differs, any of them is below a level at most that often."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(values, key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in values}
