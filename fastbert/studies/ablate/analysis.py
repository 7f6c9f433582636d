"""How much of the baseline's cost a variant needs to be as good as the baseline is in the end, and whether that can be
told from the spread over seeds.

A curve has the measured points of one training, with straight lines between them. It reaches a value where it comes to
it for good: from there on it is never worse again. So a lucky point in the middle counts for nothing, and a curve that
ends worse has not reached it. Every seed is compared with the baseline's own training of that seed (same order of the
data, same initial values where parameters are shared): its final value is the target, its final cost the whole. The
spread over seeds then holds the noise of both.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastbert.studies.ablate.options import UNITS
from fastbert.studies.shared.statistics import LEVEL, Paired, flip_limits, holm, paired

LEARNED = 1.5  # nats under the unigram entropy that a baseline must be for a verdict


@dataclass(frozen=True)
class Point:
    """What a training had cost when it was measured, and what was measured."""

    steps: float
    flops: float
    minutes: float
    value: float


Curve = Sequence[Point]
"""By ascending cost; the last is at the end of the budget."""


@dataclass(frozen=True)
class Measure:
    """A quality, and its curves."""

    name: str
    """validation loss, or a task and its metric, or the mean of tasks."""
    higher: bool
    """Whether higher is better."""
    curves: Mapping[str, Mapping[int, Curve]]
    """Variant -> seed -> curve; the baseline first. Trainings without a final value are left out."""

    @property
    def along(self) -> bool:
        """Whether it was taken at more than the last point, so that fractions of cost can be told."""
        baseline = next(iter(self.curves.values()))
        return any(len(curve) > 1 for curve in baseline.values())

    def finals(self, variant: str) -> dict[int, float]:
        """Final values by seed."""
        return {seed: curve[-1].value for seed, curve in self.curves[variant].items()}


@dataclass(frozen=True)
class Reached:
    """Where a curve reaches a value for good."""

    steps: float
    flops: float
    minutes: float
    at_most: bool
    """It was there at the first point already, perhaps before."""


def reached(curve: Curve, target: float, higher: bool) -> Reached | None:
    """Where `curve` comes to `target` for good, by straight lines between its points; None if its last is worse."""
    sign = 1 if higher else -1
    worse = [index for index, point in enumerate(curve) if sign * point.value < sign * target]
    if not worse:
        return Reached(*(getattr(curve[0], unit) for unit in UNITS), at_most=True)
    if worse[-1] == len(curve) - 1:
        return None
    a, b = curve[worse[-1]], curve[worse[-1] + 1]
    fraction = (target - a.value) / (b.value - a.value)
    return Reached(*(_between(getattr(a, unit), getattr(b, unit), fraction) for unit in UNITS), at_most=False)


def _between(a: float, b: float, fraction: float) -> float:
    return b if fraction == 1 else a + fraction * (b - a)


@dataclass(frozen=True)
class CostFraction:
    """A fraction of the baseline's cost, seed by seed."""

    values: tuple[float, ...]
    """Infinite where the target was not reached."""
    at_most: tuple[bool, ...]
    """Where the value is an upper bound."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def median_at_most(self) -> bool:
        """Whether the median is an upper bound."""
        order = sorted(zip(self.values, self.at_most, strict=True))
        half = len(order) // 2
        middle = order[half : half + 1] if len(order) % 2 else order[half - 1 : half + 1]
        return any(at_most for _, at_most in middle)


@dataclass(frozen=True)
class VariantComparison:
    """A variant against the baseline by one measure."""

    variant: str
    seeds: tuple[int, ...]
    """That both have finished."""
    fractions: dict[str, CostFraction]
    """Unit -> fraction of the baseline's final cost. Without common seeds there are none."""
    result: Paired | None
    """Of final values, the variant's minus the baseline's, positive where the variant is better; None for the baseline
    itself and without common seeds."""
    p: float | None
    """Of the paired t-test, adjusted over the variants by Holm's method."""
    p_flip: float | None
    """Of the sign-flip test, adjusted likewise."""
    verdict: str
    """reached, not reached, or undecided and why."""

    @property
    def decided(self) -> bool:
        return not self.verdict.startswith("undecided")


def compare_variants(measure: Measure, hardly_learned: bool) -> list[VariantComparison]:
    """Every variant against the first, the baseline, which comes first itself; nothing is decided if that has
    `hardly_learned`."""
    baseline, *variants = measure.curves
    shared = {name: sorted(measure.curves[name].keys() & measure.curves[baseline].keys()) for name in measure.curves}
    results = {name: _differences(measure, baseline, name, shared[name]) for name in variants if shared[name]}
    tested = {name: result.p_t for name, result in results.items() if result.p_t is not None}
    p = holm(tested)
    p_flip = holm({name: result.p_flip for name, result in results.items()})
    scatter = noise(measure)
    found = []
    for name, seeds in shared.items():
        result = results.get(name)
        fractions = {unit: _fraction(measure, baseline, name, seeds, unit) for unit in UNITS} if seeds else {}
        verdict = "baseline" if name == baseline else _verdict(result, p.get(name), scatter, hardly_learned)
        found.append(VariantComparison(name, tuple(seeds), fractions, result, p.get(name), p_flip.get(name), verdict))
    return found


def limits(rows: Sequence[VariantComparison]) -> str:
    """What the numbers of pairs in a comparison cannot show; empty where there is nothing to say."""
    pairs = [row.result.n for row in rows if row.result is not None]
    return flip_limits(pairs, len(pairs))


def _differences(measure: Measure, baseline: str, variant: str, seeds: Sequence[int]) -> Paired:
    sign = 1 if measure.higher else -1
    first, other = measure.finals(baseline), measure.finals(variant)
    return paired([sign * first[seed] for seed in seeds], [sign * other[seed] for seed in seeds])


def _fraction(measure: Measure, baseline: str, variant: str, seeds: Sequence[int], unit: str) -> CostFraction:
    values, at_most = [], []
    for seed in seeds:
        final = measure.curves[baseline][seed][-1]
        there = reached(measure.curves[variant][seed], final.value, measure.higher)
        values.append(getattr(there, unit) / getattr(final, unit) if there else math.inf)
        at_most.append(there is not None and there.at_most)
    return CostFraction(tuple(values), tuple(at_most))


def _verdict(result: Paired | None, p: float | None, scatter: "Noise | None", hardly_learned: bool) -> str:
    if result is None:
        return "undecided: no common seed has finished"
    if hardly_learned:
        return "undecided: the baseline has hardly learned"
    if result.n == 1:
        return "undecided: one seed has no spread"
    if p is None or p >= LEVEL or abs(result.mean) <= scatter.std:
        return "undecided: within the spread"
    return "reached" if result.mean > 0 else "not reached"


# --- noise


@dataclass(frozen=True)
class Noise:
    """How much final values scatter over seeds."""

    std: float
    """Standard deviation over the seeds of a variant, pooled over the variants."""
    freedom: int
    """Degrees of freedom it is known with."""
    visible: float
    """Differences of two medians or means below this are within the spread: t(0.975, n - 1) std sqrt(2 / n) with n
    seeds, for a variant and a baseline whose seeds scatter independently."""


def noise(measure: Measure) -> Noise | None:
    """None where no variant has two seeds."""
    finals = [list(measure.finals(variant).values()) for variant in measure.curves]
    finals = [values for values in finals if len(values) > 1]
    if not finals:
        return None
    from scipy.stats import t

    freedom = sum(len(values) - 1 for values in finals)
    std = math.sqrt(sum((len(values) - 1) * statistics.variance(values) for values in finals) / freedom)
    n = min(len(values) for values in finals)
    return Noise(std, freedom, float(t.ppf(1 - LEVEL / 2, n - 1)) * std * math.sqrt(2 / n))
