"""Confident learning compared with cleanlab, agreement of annotators with scikit-learn and Fleiss' example, and the fit
of the learning curve with SciPy."""

import warnings

import numpy as np
import pytest
from cleanlab.count import compute_confident_joint
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_normalized_margin_for_each_label
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.metrics import cohen_kappa_score

from fastbert.dataset_work.audit import curve
from fastbert.dataset_work.audit.agreement import NONE, cohen_kappa, disagreements, fleiss_kappa
from fastbert.dataset_work.audit.confident import confident_joint, likely_wrong, margins
from fastbert.dataset_work.audit.curve import bootstrap, fit, learning_curve


@given(
    seed=st.integers(0, 2**32),
    labels=st.integers(2, 6),
    count=st.integers(6, 150),
    skill=st.floats(-1, 3),
    rounded=st.booleans(),
)
@settings(max_examples=80)
def test_likely_wrong_labels_are_those_of_cleanlab(seed, labels, count, skill, rounded) -> None:
    """Also with ties, models worse than chance, and labels without examples."""
    rng = np.random.default_rng(seed)
    given_labels = rng.integers(0, labels, count)
    given_labels[:2] = 0, 1  # cleanlab refuses a single label
    logits = rng.normal(size=(count, labels)) * rng.uniform(0.1, 3)
    logits[np.arange(count), given_labels] += skill
    values = np.exp(logits.round() if rounded else logits)
    values /= values.sum(axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = find_label_issues(given_labels, values, filter_by="prune_by_noise_rate", n_jobs=1)
    np.testing.assert_array_equal(confident_joint(values, given_labels), compute_confident_joint(given_labels, values))
    np.testing.assert_array_equal(likely_wrong(values, given_labels), expected)
    margin = get_normalized_margin_for_each_label(given_labels, values)  # in [0, 1]
    np.testing.assert_allclose(margins(values, given_labels), 2 * margin - 1, atol=1e-12)


def test_a_planted_error_is_marked_and_a_correct_label_is_not() -> None:
    values = np.array([[0.9, 0.1]] * 10 + [[0.1, 0.9]] * 10)
    labels = np.array([0] * 10 + [1] * 10)
    assert not likely_wrong(values, labels).any()
    labels[3] = 1
    assert np.flatnonzero(likely_wrong(values, labels)).tolist() == [3]


# Fleiss (1971), as in many textbooks: 10 subjects, 14 raters, 5 categories; kappa 0.210
FLEISS = "0 0 0 0 14; 0 2 6 4 2; 0 0 3 5 6; 0 3 9 2 0; 2 2 8 1 1; 7 7 0 0 0; 3 2 6 3 0; 2 5 3 2 2; 6 5 2 1 0; 0 2 2 3 7"


def test_kappas() -> None:
    counts = [[int(word) for word in row.split()] for row in FLEISS.split(";")]
    rated = np.array([np.repeat(range(5), row) for row in counts])
    assert fleiss_kappa(rated, 5) == pytest.approx(0.210, abs=5e-4)
    more = np.concatenate([rated, np.full((1, 14), NONE)])
    assert fleiss_kappa(more, 5) == fleiss_kappa(rated, 5)
    rng = np.random.default_rng(0)
    first = rng.integers(0, 3, 40)
    second = np.where(rng.random(40) < 0.6, first, rng.integers(0, 3, 40))
    assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    second[:5] = NONE
    assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first[5:], second[5:]))
    assert cohen_kappa(first, np.full(40, NONE)) is None and cohen_kappa(first * 0, first * 0) is None
    assert fleiss_kappa(np.full((3, 2), NONE), 2) is None
    rows = np.array([[0, 0, 0], [0, 1, NONE], [0, 1, 2], [1, NONE, NONE]])
    assert disagreements(rows).tolist() == [2, 1]


def test_the_power_law_is_the_best_one_on_the_grid() -> None:
    """An exact power law is recovered; noisy ones have the least squares of SciPy's solution for each exponent, with
    coefficients that are not negative."""
    sizes = np.array([100.0, 200, 400, 800, 1600])
    exponent = curve.EXPONENTS[70]
    a, b, c = fit(sizes, (3 * sizes**-exponent + 0.1)[None])
    assert (a[0], b[0], c[0]) == pytest.approx((3, exponent, 0.1))
    rng = np.random.default_rng(1)
    errors = np.abs(2 * sizes**-0.4 + rng.normal(0, 0.05, (12, 5)))
    errors[0] = sizes / 1e4  # rises: a = 0
    a, b, c = fit(sizes, errors)
    assert (a >= 0).all() and (c >= 0).all() and (a == 0).any() and (c == 0).any()
    for row, values in enumerate(errors):
        found = float(((a[row] * sizes ** -b[row] + c[row] - values) ** 2).sum())
        designs = (np.stack([(sizes / 1600) ** -one, np.ones(5)], axis=1) for one in curve.EXPONENTS)
        assert found == pytest.approx(min(nnls(design, values)[1] ** 2 for design in designs), rel=1e-6, abs=1e-12)


def test_the_learning_curve_predicts_the_gain_of_more_labels(monkeypatch) -> None:
    """Errors without noise give the law's gain at the number of all labels, and an interval around it. Folds that
    differ widen the interval."""
    monkeypatch.setattr(curve, "RESAMPLES", 200)
    sizes, count = [100.0, 400.0, 1600.0], 1000
    folds = np.arange(count) % 5
    losses = np.stack([np.arange(count) // 5 < round(200 * (4 * size**-0.5 + 0.05)) for size in sizes]).astype(float)
    found = learning_curve(sizes, losses, folds, seed=0)
    assert found.gain == pytest.approx(4 * (1000**-0.5 - 1100**-0.5), rel=0.05)
    low, high = found.gain_interval
    assert low < found.gain < high and found.errors == losses.mean(axis=1).tolist()
    assert all(low < error < high for error, (low, high) in zip(found.errors, found.intervals, strict=True))
    again = learning_curve(sizes, losses, folds, seed=0)
    assert again == found and learning_curve(sizes, losses, folds, seed=1).gain_interval != found.gain_interval
    assert learning_curve(sizes[:2], losses[:2], folds, seed=0).law is None
    uneven = np.stack([folds == 0] * 3).astype(float)
    assert bootstrap(uneven, folds, 0).std() > 5 * bootstrap(losses, folds, 0)[:, 0].std()
