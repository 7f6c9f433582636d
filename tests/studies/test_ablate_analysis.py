"""Fractions of the baseline's cost against brute force and closed forms, and verdicts that the figures allow."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from fastbert.studies.ablate.analysis import CostFraction, Measure, Point, compare_variants, noise, reached

levels = st.integers(-6, 6)


def curve(values, costs=None, flops=10.0, minutes=0.5) -> list[Point]:
    costs = costs or [100.0 * (index + 1) for index in range(len(values))]
    points = zip(costs, values, strict=True)
    return [Point(cost / costs[-1], cost, flops * cost, minutes * cost, value) for cost, value in points]


def measure(higher: bool = True, **variants) -> Measure:
    """Variant -> a list of curves, by seed."""
    return Measure("score", higher, {name: dict(enumerate(curves)) for name, curves in variants.items()})


# --- where a curve reaches a value


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 40), levels), min_size=1, max_size=7, unique_by=lambda pair: pair[0]),
    levels,
    st.booleans(),
)
def test_reached_against_brute_force(pairs, target, higher) -> None:
    """The least cost from which on the straight lines between the points are never worse, on a fine grid."""
    costs, values = zip(*sorted(pairs), strict=True)
    ours = reached(curve(values, [float(cost) for cost in costs]), target, higher)
    grid = np.unique([*np.linspace(costs[0], costs[-1], 4001), *costs])
    line = np.interp(grid, costs, values)
    good = line >= target - 1e-9 if higher else line <= target + 1e-9
    worse = np.flatnonzero(~good)
    if len(worse) and worse[-1] == len(grid) - 1:
        assert ours is None
        return
    brute = grid[worse[-1] + 1] if len(worse) else grid[0]
    assert ours.steps == pytest.approx(brute, abs=2 * (costs[-1] - costs[0]) / 4000 + 1e-9)
    assert ours.flops == pytest.approx(10 * ours.steps) and ours.minutes == pytest.approx(ours.steps / 2)
    assert ours.at_most == (not len(worse))


def test_a_lucky_point_counts_for_nothing() -> None:
    found = reached(curve([1, 9, 2, 6, 6]), 4, True)
    assert found.steps == 350 and not found.at_most
    assert reached(curve([1, 9, 9, 9, 3]), 4, True) is None
    assert reached(curve([5, 4, 4, 7]), 4, True).at_most
    assert reached(curve([1, 4]), 4, True).steps == 200


def test_units_are_interpolated_each_for_itself() -> None:
    """Minutes need not run with the steps: a machine may be slower at times."""
    points = [Point(0.5, 100, 1e6, 1.0, 0.0), Point(1.0, 200, 2e6, 4.0, 1.0)]
    found = reached(points, 0.25, True)
    assert (found.steps, found.flops, found.minutes) == (125, 1.25e6, 1.75)


# --- fractions over seeds


def test_an_exponential_curve() -> None:
    """loss = 2 + 5 exp(-s / tau): with half the tau, half the steps. The chord of an exponential lies above it, so the
    fraction by linear interpolation is a little more, and with many points the closed form."""

    def losses(tau: float, seed: int, points: int) -> list[Point]:
        costs = [1000 * (index + 1) / points for index in range(points)]
        return curve([2 + 5 * math.exp(-cost / tau) + 1e-3 * seed for cost in costs], costs)

    for points, error in ((10, 0.03), (1000, 1e-4)):
        fast, slow = ([losses(tau, seed, points) for seed in range(3)] for tau in (200, 400))
        (base, row) = compare_variants(measure(higher=False, base=slow, fast=fast), False)
        assert base.verdict == "baseline" and base.fractions["steps"].values == (1.0, 1.0, 1.0) and base.result is None
        for unit in ("steps", "flops", "minutes"):
            median = row.fractions[unit].median
            assert median + 1e-9 >= 0.5 and median == pytest.approx(0.5, abs=error)


def test_costs_of_a_step_enter_the_fractions() -> None:
    """At half the baseline's steps, with steps of 3 times the FLOPs and 1.6 times the time."""
    base = [curve([1, 2, 3, 4]), curve([2, 3, 4, 5])]
    costly = [curve([2, 4, 6, 8], flops=30.0, minutes=0.8), curve([3, 5, 7, 9.1], flops=30.0, minutes=0.8)]
    row = compare_variants(measure(base=base, costly=costly), False)[1]
    assert row.fractions["steps"].values == (0.5, 0.5)
    assert row.fractions["flops"].values == (1.5, 1.5)
    assert row.fractions["minutes"].values == pytest.approx((0.8, 0.8))


def test_seeds_are_held_against_the_same_seed() -> None:
    """Two seeds far apart: against each other's target one would have reached it at once and one never."""
    base = [curve([0, 1, 2, 3, 4]), curve([40, 41, 42, 43, 44])]
    better = [curve([1, 2, 3, 4, 5]), curve([41, 42, 43, 44, 45])]
    row = compare_variants(measure(base=base, better=better), False)[1]
    assert row.fractions["steps"].values == (0.8, 0.8) and row.fractions["steps"].at_most == (False, False)
    assert row.result.mean == 1


def test_medians_of_bounds_and_of_what_was_not_reached() -> None:
    assert CostFraction((0.5, math.inf, 0.7), (False,) * 3).median == 0.7
    assert CostFraction((0.5, math.inf), (False,) * 2).median == math.inf
    low = CostFraction((0.1, 0.4, 0.8), (True, False, False))
    assert low.median == 0.4 and not low.median_at_most
    assert CostFraction((0.1, 0.4), (True, False)).median_at_most
    assert CostFraction((0.2, 0.1, 0.4), (True, True, False)).median_at_most


# --- verdicts


def ends(*values: float) -> list[list[Point]]:
    return [curve([0.0, value]) for value in values]


def test_verdicts() -> None:
    found = measure(
        base=ends(10.0, 10.2, 9.9),
        better=ends(13.0, 13.3, 12.9),
        worse=ends(7.0, 7.3, 6.9),
        close=ends(10.4, 9.9, 10.1),
    )
    verdicts = {row.variant: row.verdict for row in compare_variants(found, False)}
    assert verdicts == {
        "base": "baseline",
        "better": "reached",
        "worse": "not reached",
        "close": "undecided: within the spread",
    }
    for row in compare_variants(found, True)[1:]:
        assert row.verdict == "undecided: the baseline has hardly learned" and not row.decided
    alone = compare_variants(measure(base=ends(1.0), better=ends(9.0)), False)[1]
    assert alone.verdict == "undecided: one seed has no spread" and alone.fractions["steps"].values


def test_the_lower_loss_is_the_better_one() -> None:
    found = measure(higher=False, base=ends(3.0, 3.1, 3.05), low=ends(2.0, 2.1, 2.06), high=ends(4.0, 4.1, 4.06))
    _, low, high = compare_variants(found, False)
    assert (low.verdict, high.verdict) == ("reached", "not reached")
    assert low.result.mean > 0 > high.result.mean


def test_a_difference_below_the_scatter_of_seeds_is_none() -> None:
    """Pairs that agree to the third digit, while the seeds themselves are far apart."""
    found = measure(base=ends(10.0, 12.0, 14.0), same=ends(10.1, 12.1, 14.101))
    row = compare_variants(found, False)[1]
    assert row.p < 0.001 and row.verdict == "undecided: within the spread"


def test_a_difference_beyond_the_spread_may_lack_significance() -> None:
    """Values of docs/results/study.md: the pairs differ more than the seeds of a variant."""
    base = ends(4.0375, 4.0543, 4.0846)
    variants = {
        "relative": ends(3.9873, 4.0030, 3.9900),
        "tupe-a": ends(3.9703, 3.9768, 3.9783),
        "tupe-r": ends(3.9659, 3.9744, 3.9719),
    }
    found = measure(higher=False, base=base, **variants)
    rows = compare_variants(found, False)[1:]
    assert [row.verdict for row in rows] == ["undecided: p 0.057"] * 3 and not any(row.decided for row in rows)
    assert min(row.result.mean for row in rows) > noise(found).visible


def test_tests_over_several_variants_are_adjusted() -> None:
    a, b, c = [10.0, 10.5, 9.8], [11.0, 11.6, 10.6], [10.9, 11.6, 10.8]
    rows = compare_variants(measure(base=ends(*a), one=ends(*b), two=ends(*c)), False)
    p = [float(ttest_rel(values, a).pvalue) for values in (b, c)]
    assert [row.p for row in rows[1:]] == pytest.approx([min(1, 2 * min(p)) if x == min(p) else max(p) for x in p])
    assert compare_variants(measure(base=ends(*a), one=ends(*b)), False)[1].p == pytest.approx(p[0])


def test_what_is_missing() -> None:
    """Only seeds that both have finished are compared; a variant with none is undecided."""
    curves = {"base": dict(enumerate(ends(1.0, 2.0, 3.0))), "one": {1: curve([0.0, 5.0])}, "none": {}}
    base, one, none = compare_variants(Measure("score", True, curves), False)
    assert base.seeds == (0, 1, 2) and one.seeds == (1,) and one.result.n == 1
    assert none.seeds == () and none.fractions == {} and none.verdict == "undecided: no common seed has finished"


def test_noise() -> None:
    a, b = [1.0, 2.0, 4.0], [10.0, 10.5]
    found = noise(measure(base=ends(*a), other=ends(*b), single=ends(3.0)))
    pooled = (2 * statistics.variance(a) + statistics.variance(b)) / 3
    assert found.std == pytest.approx(math.sqrt(pooled)) and found.freedom == 3
    assert found.visible == pytest.approx(12.7062 * found.std, rel=1e-4)  # t(0.975, 1) of the table, n = 2
    assert noise(measure(base=ends(1.0), other=ends(2.0))) is None
