"""Fractions of the baseline's cost that a variant needs for the baseline's final quality, and verdicts on them.

A curve consists of the measured points of one training, linearly interpolated. It reaches a value at the cost from
which it is never worse again: a lucky point in the middle does not count, and a curve that ends worse has not
reached it. Every seed is compared with the baseline's training of the same seed, which has the same order of the data
and the same initial values of the parameters that both have. The target is that training's final value, and fractions
are relative to its final cost. The spread over seeds thus contains the noise of both.

Where every point is the end of a separate training (`anneal`), a measure can also be read as of a smaller budget
(`Measure.until`), and each curve where it has cost as much as the baseline's (`Measure.at_cost`).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastbert.studies.ablate.options import UNITS
from fastbert.studies.shared.statistics import LEVEL, Paired, flip_limits, holm, paired

LEARNED = 1.5  # nats below the unigram entropy that a baseline must reach for a verdict
SAME_COST = 0.01  # relative difference of costs that count as equal, such as those of budgets in whole steps


@dataclass(frozen=True)
class Point:
    """A measured value of a training, and the training's cost until then."""

    fraction: float
    """Position of the point, as a fraction of the budget."""
    steps: float
    flops: float
    minutes: float
    value: float


Curve = Sequence[Point]
"""Points in the order of their cost; the last is at the end of the budget."""


@dataclass(frozen=True)
class Measure:
    """A measure of quality with its curves."""

    name: str
    """Validation loss, a task with its metric, or the mean of several tasks."""
    higher: bool
    """True if higher values are better."""
    curves: Mapping[str, Mapping[int, Curve]]
    """Variant -> seed -> curve, the baseline first; trainings without a final value are left out."""

    @property
    def along(self) -> bool:
        """True if it was measured at more than the last point, which fractions of cost require."""
        baseline = next(iter(self.curves.values()))
        return any(len(curve) > 1 for curve in baseline.values())

    def finals(self, variant: str) -> dict[int, float]:
        """Final values by seed."""
        return {seed: curve[-1].value for seed, curve in self.curves[variant].items()}

    @property
    def fractions(self) -> list[float]:
        """Points of the baseline, as fractions of the budget."""
        baseline = next(iter(self.curves.values()))
        return sorted({point.fraction for curve in baseline.values() for point in curve})

    def until(self, fraction: float) -> "Measure":
        """The measure as of a budget that ends at the point `fraction`, without trainings that have no value there."""
        curves = {
            variant: {
                seed: [point for point in curve if point.fraction <= fraction]
                for seed, curve in seeds.items()
                if any(point.fraction == fraction for point in curve)
            }
            for variant, seeds in self.curves.items()
        }
        return replace(self, curves=curves)

    def at_cost(self, unit: str) -> "Measure":
        """The measure as if every training had ended when its cost in `unit` was that of the baseline's training of the
        same seed, without the trainings whose points do not include that cost."""
        costs = {seed: getattr(curve[-1], unit) for seed, curve in next(iter(self.curves.values())).items()}
        curves = {
            variant: {
                seed: ended
                for seed, curve in seeds.items()
                if seed in costs and (ended := end_at(curve, unit, costs[seed])) is not None
            }
            for variant, seeds in self.curves.items()
        }
        return replace(self, curves=curves)


@dataclass(frozen=True)
class Reached:
    """Cost from which a curve is at least as good as a value."""

    steps: float
    flops: float
    minutes: float
    at_most: bool
    """True if already the first point is as good: the cost is an upper bound."""


def reached(curve: Curve, target: float, higher: bool) -> Reached | None:
    """Cost from which `curve` is at least as good as `target`, linearly interpolated; None if it ends worse."""
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


def end_at(curve: Curve, unit: str, cost: float) -> Curve | None:
    """`curve` up to `cost`, with a last point that is linearly interpolated; None if its points do not include that
    cost. A curve that ends within SAME_COST of it is returned as it is."""
    costs = [getattr(point, unit) for point in curve]
    if abs(costs[-1] - cost) <= SAME_COST * cost:
        return curve
    if not costs[0] <= cost <= costs[-1]:
        return None
    after = next(index for index, other in enumerate(costs) if other > cost)
    a, b = curve[after - 1], curve[after]
    weight = (cost - costs[after - 1]) / (costs[after] - costs[after - 1])
    end = {name: _between(value, getattr(b, name), weight) for name, value in vars(a).items()}
    return [*curve[:after], Point(**end)]


@dataclass(frozen=True)
class CostFraction:
    """Fractions of the baseline's cost, seed by seed."""

    values: tuple[float, ...]
    """One for each seed; infinite where the target was not reached."""
    at_most: tuple[bool, ...]
    """True for each value that is an upper bound."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def median_at_most(self) -> bool:
        """True if the median is an upper bound."""
        order = sorted(zip(self.values, self.at_most, strict=True))
        half = len(order) // 2
        middle = order[half : half + 1] if len(order) % 2 else order[half - 1 : half + 1]
        return any(at_most for _, at_most in middle)


@dataclass(frozen=True)
class VariantComparison:
    """A variant compared with the baseline by one measure."""

    variant: str
    seeds: tuple[int, ...]
    """Seeds that both have finished."""
    fractions: dict[str, CostFraction]
    """Unit -> fractions of the baseline's final cost; empty without common seeds."""
    result: Paired | None
    """Differences of final values, positive where the variant is better; None for the baseline itself and without
    common seeds."""
    p: float | None
    """p-value of the paired t-test, adjusted over the variants by Holm's method."""
    p_flip: float | None
    """p-value of the sign-flip test, adjusted in the same way."""
    verdict: str
    """reached, not reached, or undecided with the reason."""

    @property
    def decided(self) -> bool:
        return not self.verdict.startswith("undecided")


def compare_variants(measure: Measure, hardly_learned: bool, longer: Measure | None = None) -> list[VariantComparison]:
    """Compares every variant with the baseline, which comes first in `measure` and in the result; gives no verdict if
    the baseline has `hardly_learned`.

    Args:
        longer: measure with later points than `measure`, if there are any: a variant that does not reach the target
            within `measure` may reach it there, at more than the baseline's cost.
    """
    baseline, *variants = measure.curves
    common = {name: sorted(measure.curves[name].keys() & measure.curves[baseline].keys()) for name in measure.curves}
    results = {name: _differences(measure, baseline, name, common[name]) for name in variants if common[name]}
    tested = {name: result.p_t for name, result in results.items() if result.p_t is not None}
    p = holm(tested)
    p_flip = holm({name: result.p_flip for name, result in results.items()})
    scatter = noise(measure)
    found = []
    for name, seeds in common.items():
        result = results.get(name)
        fractions = {unit: _fraction(measure, longer, baseline, name, seeds, unit) for unit in UNITS} if seeds else {}
        verdict = "baseline" if name == baseline else _verdict(result, p.get(name), scatter, hardly_learned)
        found.append(VariantComparison(name, tuple(seeds), fractions, result, p.get(name), p_flip.get(name), verdict))
    return found


def limits(rows: Sequence[VariantComparison]) -> str:
    """`flip_limits` of a comparison."""
    pairs = [row.result.n for row in rows if row.result is not None]
    return flip_limits(pairs, len(pairs))


def _differences(measure: Measure, baseline: str, variant: str, seeds: Sequence[int]) -> Paired:
    sign = 1 if measure.higher else -1
    first, other = measure.finals(baseline), measure.finals(variant)
    return paired([sign * first[seed] for seed in seeds], [sign * other[seed] for seed in seeds])


def _fraction(
    measure: Measure, longer: Measure | None, baseline: str, variant: str, seeds: Sequence[int], unit: str
) -> CostFraction:
    values, at_most = [], []
    for seed in seeds:
        final = measure.curves[baseline][seed][-1]
        cost = reached(measure.curves[variant][seed], final.value, measure.higher)
        if cost is None and longer is not None:
            cost = reached(longer.curves[variant][seed], final.value, measure.higher)
        values.append(getattr(cost, unit) / getattr(final, unit) if cost else math.inf)
        at_most.append(cost is not None and cost.at_most)
    return CostFraction(tuple(values), tuple(at_most))


def _verdict(result: Paired | None, p: float | None, scatter: "Noise | None", hardly_learned: bool) -> str:
    if result is None:
        return "undecided: no common seed has finished"
    if hardly_learned:
        return "undecided: the baseline has hardly learned"
    if result.n == 1:
        return "undecided: one seed has no spread"
    if p is not None and p >= LEVEL and scatter is not None and abs(result.mean) > scatter.visible:
        return f"undecided: p {p:.2g}"
    if p is None or p >= LEVEL or abs(result.mean) <= scatter.std:
        return "undecided: within the spread"
    return "reached" if result.mean > 0 else "not reached"


# --- noise


@dataclass(frozen=True)
class Noise:
    """Spread of final values over seeds."""

    std: float
    """Standard deviation over the seeds of a variant, pooled over the variants."""
    freedom: int
    """Degrees of freedom of the estimate."""
    visible: float
    """Smallest difference of two means beyond the spread: t(0.975, n - 1) std sqrt(2 / n) with n seeds, where the
    seeds of a variant and of the baseline are independent."""


def noise(measure: Measure) -> Noise | None:
    """Spread pooled over the variants; None where no variant has two seeds."""
    finals = [list(measure.finals(variant).values()) for variant in measure.curves]
    finals = [values for values in finals if len(values) > 1]
    if not finals:
        return None
    from scipy.stats import t

    freedom = sum(len(values) - 1 for values in finals)
    std = math.sqrt(sum((len(values) - 1) * statistics.variance(values) for values in finals) / freedom)
    n = min(len(values) for values in finals)
    return Noise(std, freedom, float(t.ppf(1 - LEVEL / 2, n - 1)) * std * math.sqrt(2 / n))
