"""Tests on pairs against SciPy's, Holm against its definition, and what no test may decide."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, permutation_test, ttest_rel

from fastbert.finetuning.results import score_summary
from fastbert.studies.shared.statistics import flip_limits, holm, paired, sign_flip

# Sixty-fourths are exact in binary: SciPy compares sums that are mathematically equal as they come, rounding and all.
score = st.integers(-30, 30).map(lambda value: value / 64)


@settings(max_examples=60)
@given(st.lists(st.tuples(score, score), min_size=2, max_size=8))
def test_pairs_against_scipy(pairs) -> None:
    a, b = zip(*pairs, strict=True)
    ours = paired(a, b)
    assert ours.n == len(a) and ours.mean == pytest.approx(np.mean(b) - np.mean(a))
    exact = permutation_test(
        (np.array(b) - np.array(a),), lambda x, axis: np.mean(x, axis), permutation_type="samples", vectorized=True
    )
    assert ours.p_flip == pytest.approx(float(exact.pvalue))
    if len({round(y - x, 9) for x, y in zip(a, b, strict=True)}) == 1:
        assert (ours.p_t, ours.low, ours.high) == (None, None, None)
    else:
        theirs = ttest_rel(b, a)
        interval = theirs.confidence_interval(0.95)
        assert ours.p_t == pytest.approx(float(theirs.pvalue), abs=1e-12)
        assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=8))
@example([-30, 18, -11, -40, -8, 22, 49])  # sums to zero, which its fortieths do not quite
def test_sign_flips_against_whole_numbers(whole: list[int]) -> None:
    """Ties count, although the scores (such as accuracies of 40 examples) add up to them only up to rounding."""
    sums = [abs(sum(sign * value for sign, value in zip(signs, whole, strict=True))) for signs in flips(len(whole))]
    exact = sum(value >= abs(sum(whole)) for value in sums) / len(sums)
    assert sign_flip(np.array(whole) / 40) == exact


def flips(n: int) -> list[tuple[int, ...]]:
    return list(product((1, -1), repeat=n))


def test_few_seeds_cannot_give_a_small_p() -> None:
    """The smallest p of n pairs is 2^(1 - n): 0.25 of three, 0.03 of six."""
    for n in (1, 2, 3, 6):
        assert paired([0.0] * n, [1.0 + seed / 100 for seed in range(n)]).p_flip == 2.0 ** (1 - n)
    alone = paired([0.5], [0.7])
    assert (alone.n, alone.low, alone.high, alone.p_t) == (1, None, None, None)


def test_what_few_pairs_cannot_show() -> None:
    """The least p by the test itself, for differences of one sign, and by Holm over tests that are all like this."""

    def least(n: int, tests: int) -> float:
        p = paired([0.0] * n, [1.0 + seed / 100 for seed in range(n)]).p_flip
        return max(holm({str(number): p for number in range(tests)}).values())

    for n, shown in ((1, "1"), (2, "0.5"), (3, "0.25"), (5, "0.0625")):
        assert f"{least(n, 1):.3g}" == shown
        seeds = f"{n} seed{'s' if n > 1 else ''}"
        assert f": with {seeds} it cannot be less than {shown}. Such" in flip_limits([n])
        assert ("with 1 seed there is no test" in flip_limits([n, 5])) == (n == 1)
    assert flip_limits([6]) == flip_limits([6, 9]) == flip_limits([]) == "" and least(6, 1) < 0.05
    assert "with 6 seeds it cannot be less than 0.0312 (0.0625 adjusted over 2)." in flip_limits([6], 2)
    assert least(6, 2) == 0.0625 and least(7, 3) < 0.05 and flip_limits([7], 3) == ""
    assert "less than 0.25 (1 adjusted over 7)" in flip_limits([3, 3, 3], 7)
    both = flip_limits([9, 3, 5, 3], 1)
    assert "with 3 seeds it cannot be less than 0.25; with 5 seeds it cannot be less than 0.0625." in both
    assert "9" not in both and both.count("0.25") == 1


def test_signs_are_sampled_where_there_are_too_many_to_try() -> None:
    differences = np.random.default_rng(3).normal(0.25, 1.0, size=24)
    sampled, (exact_of_20,) = sign_flip(differences), (sign_flip(differences[:20]),)
    theirs = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=50_000, rng=1)
    assert sampled == pytest.approx(theirs.pvalue, abs=0.01)
    assert 0 < exact_of_20 < 1
    assert sign_flip(differences) == sampled  # the same every time


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_by_its_definition(values: list[float]) -> None:
    """A hypothesis is rejected if it and all with smaller p pass p <= level / (how many are left): the adjusted value
    is the smallest level at which that happens."""
    named = {str(index): value for index, value in enumerate(values)}
    adjusted = holm(named)
    ranked = sorted(values)
    for name, value in named.items():
        steps = [(len(values) - rank) * p for rank, p in enumerate(ranked) if p <= value]
        least = max(steps[: ranked.index(value) + 1])
        assert adjusted[name] == pytest.approx(min(1.0, least))
        assert value <= adjusted[name] <= min(1.0, len(values) * value) + 1e-12  # between none and Bonferroni
        # The false discovery rate is the weaker demand.
        assert adjusted[name] >= false_discovery_control(values, method="bh")[int(name)] - 1e-12


def test_summary() -> None:
    assert score_summary([0.1, -0.4, 0.3]) == {
        "median": 0.1,
        "mean": pytest.approx(0.0),
        "std": pytest.approx(np.std([0.1, -0.4, 0.3], ddof=1)),
        "max": 0.3,
    }
    assert score_summary([-0.2]) == {"median": -0.2, "mean": -0.2, "std": None, "max": -0.2}
